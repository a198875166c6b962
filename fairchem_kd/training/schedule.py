"""A config's schedule, for another number of epochs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

#: What counts steps in ``optim``, and is stretched with them.
_IN_STEPS = ("T_max", "warmup_steps", "decay_steps")


def steps_per_epoch(config: Mapping[str, Any], structures: int) -> int:
    """Batches of an epoch; the last one may be smaller."""
    return -(-structures // int(config["optim"]["batch_size"]))


def stretch(config: Mapping[str, Any], epochs: int, per_epoch: int) -> dict[str, Any]:
    """The config for so many epochs, its learning-rate schedule stretched or shrunk with them.

    ``eval_every`` stays, but for what makes the last step one that is evaluated.

    Args:
        config: of a training.
        epochs: in place of its ``optim.max_epochs``.
        per_epoch: steps of an epoch.
    """
    stretched = copy.deepcopy(dict(config))
    optim = stretched["optim"]
    before, now = int(optim["max_epochs"]) * per_epoch, epochs * per_epoch
    optim["max_epochs"] = epochs
    for key in _IN_STEPS:
        if key in optim:
            optim[key] = max(1, round(optim[key] * now / before))
    if "lr_milestones" in optim:
        optim["lr_milestones"] = [max(1, round(m * now / before)) for m in optim["lr_milestones"]]
    wanted = int(optim.get("eval_every", per_epoch))
    divisors = [n for n in range(1, now + 1) if now % n == 0]
    optim["eval_every"] = min(divisors, key=lambda n: (abs(n - wanted), n))
    return stretched
