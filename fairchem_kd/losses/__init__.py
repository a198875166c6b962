"""The distillation losses, by kind; importing this registers those of the package."""

from __future__ import annotations

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
from fairchem_kd.losses.elementwise import elementwise
from fairchem_kd.losses.features import (
    EdgeToNode,
    FeatureLoss,
    FeatureOptions,
    NodeToNode,
    VectorToVector,
)
from fairchem_kd.losses.gather import gather_rows
from fairchem_kd.losses.outputs import PerAtomEnergy, Vanilla
from fairchem_kd.losses.projection import projection
from fairchem_kd.losses.standardize import Standardizer

__all__ = [
    "EdgeToNode",
    "ElementwiseOptions",
    "FeatureLoss",
    "FeatureOptions",
    "Labels",
    "Loss",
    "LossInputs",
    "LossOptions",
    "NodeToNode",
    "Part",
    "PerAtomEnergy",
    "Standardizer",
    "Vanilla",
    "VectorToVector",
    "elementwise",
    "gather_rows",
    "known_losses",
    "loss_class",
    "masked_sum",
    "projection",
    "register_loss",
]
