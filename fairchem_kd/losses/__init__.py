"""The distillation losses, by kind; importing this registers those of the package."""

from __future__ import annotations

from fairchem_kd.losses.base import (
    DEFAULT_COEFFICIENTS,
    Loss,
    LossInputs,
    LossOptions,
    Part,
    known_losses,
    loss_class,
    register_loss,
)
from fairchem_kd.losses.features import EdgeToNode, FeatureLoss, NodeToNode, VectorToVector
from fairchem_kd.losses.outputs import PerAtomEnergy, Vanilla

__all__ = [
    "DEFAULT_COEFFICIENTS",
    "EdgeToNode",
    "FeatureLoss",
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
    "register_loss",
]
