"""Structures beyond the labelled batch: rattled copies, and structures without labels."""

from fairchem_kd.distillation.companions.join import Companions
from fairchem_kd.distillation.companions.making import make_companions
from fairchem_kd.distillation.companions.rattle import (
    ADVERSARIAL,
    AdversarialOptions,
    RattleOptions,
    Rattler,
)
from fairchem_kd.distillation.companions.unlabelled import UnlabelledLoader, UnlabelledOptions

__all__ = [
    "ADVERSARIAL",
    "AdversarialOptions",
    "Companions",
    "RattleOptions",
    "Rattler",
    "UnlabelledLoader",
    "UnlabelledOptions",
    "make_companions",
]
