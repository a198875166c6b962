"""``task.soft_lengths``: how soft the lengths of a PaiNN's vector features are, by a config.

What that does to a model is in :mod:`fairchem_kd.stock.soft_lengths`; here is what a config says,
without importing fairchem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.schema import is_null, read_value

KEY = "soft_lengths"
WHERE = f"task.{KEY}"
STOCK = 1e-4  #: the root of what stock's PaiNN adds to the square of a length
_RANGE = {"ge": 1e-3, "le": 1.0}


def softness(config: Mapping[str, Any]) -> float | None:
    """The softness that a config asks for (``task.soft_lengths``); None: stock's own.

    Raises:
        UserError: it is no number from 0.001 to 1.
    """
    task = config.get("task")
    given = task.get(KEY) if isinstance(task, Mapping) else None
    return None if is_null(given) else float(read_value(float, given, WHERE, _RANGE))


def halvings(soft: float | None) -> int:
    """By which power of two vectors are smaller in stock's weights than in those that are trained.

    So that stock's own softness, :data:`STOCK`, is ``soft`` beside them, to within a factor of
    the root of two.
    """
    return 0 if soft is None else round(math.log2(soft / STOCK))


def check_softness(config: dict[str, Any], *, ours: bool) -> None:
    """Check what ``task.soft_lengths`` needs of a config, and coerce the key.

    Args:
        config: of a training; without that key it is left as it is.
        ours: whether its trainer is one of ours.

    Raises:
        UserError: the key is no such number, or another does not go with it.
    """
    soft = softness(config)
    if soft is None:
        return
    config["task"][KEY] = soft
    if not ours:
        raise UserError(
            f"{WHERE} is read by trainer: fairchem_kd.DistillationTrainer alone (which, without "
            f"task.distillation, trains plainly), and the trainer is {config.get('trainer')!r}, "
            "which would train the weights as they are: name ours, or take the key out."
        )
    if config.get("amp"):
        raise UserError(
            f"{WHERE} and amp: true do not go together, since it makes numbers small, and those of "
            "half precision end at 6e-8: set amp: false."
        )
