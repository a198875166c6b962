"""Stock's trainer, with what is worked around in it: one function each, with the reason."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch
from fairchem.core.common import distutils


def fresh_timestamp(
    run_dir: str, device: torch.device, suffix: str | None, *, claim: bool = True
) -> str:
    """A name for a new run that no other run has, the same on every rank.

    Stock's ``_get_timestamp`` sends the time through a float32 tensor: a granularity of 128 s, so
    that two runs with the same identifier share a folder and the second silently resumes the first.
    Here the first rank claims the folder by creating it (a debugging run makes no folders, and
    claims none), and tells its name to the others.
    """
    name = [""]
    if distutils.is_master():
        now = datetime.datetime.now()
        while True:
            name[0] = now.strftime("%Y-%m-%d-%H-%M-%S") + (f"-{suffix}" if suffix else "")
            if not claim:
                break
            try:
                os.makedirs(os.path.join(run_dir, "checkpoints", name[0]))
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    distutils.broadcast_object_list(name, src=0, device=device)
    return name[0]


def with_primary_metric(given: dict[str, Any] | None, outputs: Iterable[str]) -> dict[str, Any]:
    """``evaluation_metrics`` with a primary metric: where none is given, an MAE, of forces first.

    Stock's ``update_best`` fails without one (``"mae" in None``). Where a config names ``trainer:
    forces`` or ``energy``, stock has defaults, but those go with these names.
    """
    chosen = dict(given or {})
    chosen["metrics"] = chosen.get("metrics") or {name: ["mae"] for name in outputs}
    if not chosen.get("primary_metric"):
        measured = [name for name, metrics in chosen["metrics"].items() if "mae" in metrics]
        if measured:
            name = "forces" if "forces" in measured else measured[0]
            chosen["primary_metric"] = f"{name}_mae"
    return chosen
