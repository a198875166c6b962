"""The distillation losses, by kind; importing this registers those of the package."""

from __future__ import annotations

from fairchem_kd.losses.alignment import LinearCKA
from fairchem_kd.losses.antisymmetric import Antisymmetric
from fairchem_kd.losses.base import (
    ElementwiseOptions,
    Labels,
    Loss,
    LossInputs,
    LossOptions,
    Part,
    known_losses,
    loss_class,
    masked_sum,
    register_loss,
)
from fairchem_kd.losses.edges import EdgeToEdge, match_edges
from fairchem_kd.losses.elementwise import elementwise, vectorwise
from fairchem_kd.losses.features import (
    EdgeToNode,
    FeatureLoss,
    FeatureOptions,
    NodeToNode,
    VectorToVector,
)
from fairchem_kd.losses.gather import gather_rows
from fairchem_kd.losses.geometric import GeometricVectors
from fairchem_kd.losses.jacobian import Jacobian, JacobianAntithetic, pair_atoms
from fairchem_kd.losses.metric import NodesByHead, VectorsByHead
from fairchem_kd.losses.outputs import PerAtomEnergy, Vanilla
from fairchem_kd.losses.pairs import PairLoss
from fairchem_kd.losses.projection import projection
from fairchem_kd.losses.relational import Relational
from fairchem_kd.losses.standardize import Standardizer
from fairchem_kd.losses.structure import GlobalStructure, LocalStructure

__all__ = [
    "Antisymmetric",
    "EdgeToEdge",
    "EdgeToNode",
    "ElementwiseOptions",
    "FeatureLoss",
    "FeatureOptions",
    "GeometricVectors",
    "GlobalStructure",
    "Jacobian",
    "JacobianAntithetic",
    "Labels",
    "LinearCKA",
    "LocalStructure",
    "Loss",
    "LossInputs",
    "LossOptions",
    "NodeToNode",
    "NodesByHead",
    "PairLoss",
    "Part",
    "PerAtomEnergy",
    "Relational",
    "Standardizer",
    "Vanilla",
    "VectorToVector",
    "VectorsByHead",
    "elementwise",
    "gather_rows",
    "known_losses",
    "loss_class",
    "masked_sum",
    "match_edges",
    "pair_atoms",
    "projection",
    "register_loss",
    "vectorwise",
]
