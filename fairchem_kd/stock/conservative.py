"""``task.conservative``: whether a config has its forces taken from the energy.

What that does to a model is in :mod:`fairchem_kd.stock.gradient_forces`; here is what a config
says, without importing fairchem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.schema import is_null, read_value

KEY = "conservative"
WHERE = f"task.{KEY}"


def is_conservative(config: Mapping[str, Any]) -> bool:
    """Whether a config has its forces taken from the energy (``task.conservative``).

    Raises:
        UserError: it says neither true nor false.
    """
    task = config.get("task")
    given = task.get(KEY) if isinstance(task, Mapping) else None
    return False if is_null(given) else bool(read_value(bool, given, WHERE, {}))


def check_conservative(config: dict[str, Any], *, ours: bool) -> None:
    """Check what a training with ``task.conservative`` needs of its config, and coerce the key.

    Args:
        config: of a training; without that key, or with false, it is left as it is.
        ours: whether its trainer is one of ours.

    Raises:
        UserError: the key is no truth value, or another does not go with it.
    """
    if not is_conservative(config):
        return
    config["task"][KEY] = True
    if not ours:
        raise UserError(
            f"{WHERE} is read by trainer: fairchem_kd.DistillationTrainer alone (which, without "
            f"task.distillation, trains plainly), and the trainer is {config.get('trainer')!r}, "
            "which would know no forces: name ours, or take the key out."
        )
    model, outputs = config.get("model") or {}, config.get("outputs") or {}
    refuse_own_forces(model.get("regress_forces", True), "model.regress_forces")
    for name, level in (("energy", "system"), ("forces", "atom")):
        if name not in outputs:
            raise UserError(
                f"{WHERE} makes forces out of the energy, and outputs has no '{name}': add "
                f"outputs.{name}: {{level: {level}}}, or take the key out."
            )
    losses = config.get("loss_functions") or []
    if not any("energy" in loss for loss in losses if isinstance(loss, Mapping)):
        raise UserError(
            f"{WHERE} needs a loss on the energy too, since its forces leave the energy's zero "
            "open, and loss_functions has none: add for example energy: {fn: mae, coefficient: 1}."
        )
    if config.get("amp"):
        raise UserError(
            f"{WHERE} and amp: true do not go together, since gradients of a half-precision energy "
            "are no forces: set amp: false."
        )


def refuse_own_forces(given: Any, key: str) -> None:
    """Refuse a model that makes forces itself, by its ``regress_forces``.

    Raises:
        UserError: it is not false.
    """
    if is_null(given) or read_value(bool, given, key, {}):
        raise UserError(
            f"{WHERE} takes forces from the energy, and {key} is not false, so that the model "
            f"makes forces of its own: set {key}: false."
        )
