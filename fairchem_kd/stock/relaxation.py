"""Stock's relaxations with newer releases of ASE."""

from __future__ import annotations

from typing import Any

import numpy as np
from fairchem.core.common.relaxation import optimizable

from fairchem_kd.errors import UserError


def make_relaxable() -> None:
    """Give stock's batches for relaxations the methods that ASE asks of them since 3.24.

    ASE's ``Optimizable`` gained abstract methods, so that a class of fairchem-core 1.10 that has
    not got them cannot be made, and ``--mode run-relaxations`` always fails. Stock's own optimiser
    uses none of these; ASE's do.
    """
    for cls in (optimizable.OptimizableBatch, optimizable.OptimizableUnitCellBatch):
        missing: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
        for name in missing & _METHODS.keys():
            setattr(cls, name, _METHODS[name])
        cls.__abstractmethods__ = frozenset(missing - _METHODS.keys())


def _flat(values: Any) -> Any:
    values = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    return values.reshape(-1)


_METHODS: dict[str, Any] = {
    "ndofs": lambda self: 3 * len(self),
    "get_x": lambda self: _flat(self.get_positions()),
    "set_x": lambda self, x: self.set_positions(np.asarray(x).reshape(-1, 3)),
    "get_gradient": lambda self: -_flat(self.get_forces()),
    "get_value": lambda self: float(self.get_potential_energy()),
}


def take_optimizer_name(config: dict[str, Any]) -> None:
    """Take ``task.relax_opt.name``, which configs of OCP have and stock's optimiser does not.

    Raises:
        UserError: it is not the optimiser that stock has, or there are no options at all.
    """
    task = config.get("task")
    options = task.get("relax_opt") if isinstance(task, dict) else None
    if not isinstance(options, dict):
        raise UserError(
            "task.relax_opt is missing, the options of the relaxation: give it, for example "
            "{maxstep: 0.04, memory: 50, damping: 1.0, alpha: 70.0, traj_dir: trajectories}."
        )
    name = options.get("name", "lbfgs")
    if str(name).lower() != "lbfgs":
        raise UserError(f"task.relax_opt.name is {name!r}, and fairchem-core has lbfgs alone.")
    config["task"] = {
        **config["task"],
        "relax_opt": {k: v for k, v in options.items() if k != "name"},
    }
