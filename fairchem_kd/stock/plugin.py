"""Registering our trainer and models with fairchem, where fairchem-core is one that we know."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from fairchem_kd.errors import UserError

#: The module whose import registers the models, and where the trainer is, by its short name.
MODELS = "fairchem_kd.features.wrappers"
TRAINERS = {"distillation": ("fairchem_kd.distillation.trainer", "DistillationTrainer")}


def check_fairchem_core() -> None:
    """Make sure that fairchem-core is installed, in a version that this package is made for.

    Raises:
        UserError: it is missing, older than 1.10, or 2.x.
    """
    mend = "install it with: pip install 'fairchem-core>=1.10,<2'."
    try:
        installed = version("fairchem-core")
    except PackageNotFoundError:
        raise UserError(f"fairchem-kd needs fairchem-core 1.10, which is missing; {mend}") from None
    major, minor = (int(part) for part in installed.split(".")[:2])
    if major != 1 or minor < 10:
        why = "2.x has other models, trainers and checkpoints" if major > 1 else "this one is older"
        raise UserError(
            f"fairchem-kd works with fairchem-core 1.10 or a later 1.x, but {installed} is "
            f"installed ({why}); in an environment of its own, {mend}"
        )


def register() -> None:
    """Register the trainer and the model wrappers with fairchem, once.

    Raises:
        UserError: as :func:`check_fairchem_core`.
    """
    check_fairchem_core()
    importlib.import_module(MODELS)
    importlib.import_module("fairchem_kd.stock.graphs").use_our_radius_graph()
    importlib.import_module("fairchem_kd.stock.search").look_before_searching()
    from fairchem.core.common.registry import registry

    for short, (module, name) in TRAINERS.items():
        registry.register_trainer(short)(getattr(importlib.import_module(module), name))
