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
from fairchem_kd.losses.features import (
    EdgeToNode,
    FeatureLoss,
    FeatureOptions,
    NodeToNode,
    VectorToVector,
)
from fairchem_kd.losses.outputs import PerAtomEnergy, Vanilla

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
    "Vanilla",
    "VectorToVector",
    "known_losses",
    "loss_class",
    "masked_sum",
    "register_loss",
]
