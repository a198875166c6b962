"""Knowledge distillation for the energy and force models of fairchem-core 1.x.

fairchem takes about 6 s to import, so nothing is imported here: each public name is, with what it
needs, when it is first used. ``trainer: fairchem_kd.DistillationTrainer`` in a config is such a
use, and it registers everything of ours with fairchem. For the short names (``distillation``,
``painn_kd``, ...) in a script of one's own, call :func:`register` first; the commands do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.moved import know_old_names
from fairchem_kd.stock.plugin import register

if TYPE_CHECKING:
    from fairchem_kd.distillation.distiller import Distiller
    from fairchem_kd.distillation.trainer import DistillationTrainer
    from fairchem_kd.features import FeatureExtractor, available_features
    from fairchem_kd.md.calculator import StudentCalculator
    from fairchem_kd.md.module import ModuleCalculator
    from fairchem_kd.models.frozen import Teacher

__all__ = [
    "DistillationTrainer",
    "Distiller",
    "FeatureExtractor",
    "ModuleCalculator",
    "StudentCalculator",
    "Teacher",
    "UserError",
    "__version__",
    "available_features",
    "register",
]

_HOME = {
    "DistillationTrainer": "fairchem_kd.distillation.trainer",
    "Distiller": "fairchem_kd.distillation.distiller",
    "FeatureExtractor": "fairchem_kd.features",
    "ModuleCalculator": "fairchem_kd.md.module",
    "StudentCalculator": "fairchem_kd.md.calculator",
    "Teacher": "fairchem_kd.models.frozen",
    "available_features": "fairchem_kd.features",
}


know_old_names()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fairchem_kd' has no attribute '{name}'")
    register()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
