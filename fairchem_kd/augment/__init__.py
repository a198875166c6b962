"""Structures beyond the labelled batch: rattled copies, and structures without labels."""

from fairchem_kd.augment.companions import Companions
from fairchem_kd.augment.rattle import RattleOptions, Rattler
from fairchem_kd.augment.unlabelled import UnlabelledLoader, UnlabelledOptions

__all__ = ["Companions", "RattleOptions", "Rattler", "UnlabelledLoader", "UnlabelledOptions"]
