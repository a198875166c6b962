"""Stock's command, taken with a config, a runner, ranks and an executor of ours."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairchem.core import _cli
from submitit import AutoExecutor
from torch.distributed.launcher.api import LaunchConfig


def launch_config(**stock: Any) -> LaunchConfig:
    """Elastic launch's config, for a run whose ranks meet at a place of their own.

    Stock names none, which means port 29400 of this machine: a second run joins the first one's
    store there, and dies when the first one ends.
    """
    return LaunchConfig(**{"rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex, **stock})


@contextmanager
def stock_command_with(
    *,
    config: dict[str, Any],
    grid: Callable[[dict[str, Any], Path], list[dict[str, Any]]] | None,
    runner: type,
    rank: Callable[[dict[str, Any]], None],
    executor: Callable[..., AutoExecutor],
) -> Iterator[None]:
    """Within the block, stock's ``_cli.main`` takes this config, Runner, rank function, executor.

    It builds its config inside and launches functions of its own module: there is no hook for data
    to be built first, for a plugin in launched processes, or for an error without a traceback. The
    Runner and the rank function must be importable, since launched processes and SLURM jobs
    unpickle them.
    """
    replacements = {
        "build_config": lambda args, overrides: config,
        "create_grid": grid,
        "Runner": runner,
        "runner_wrapper": rank,
        "AutoExecutor": executor,
        "LaunchConfig": launch_config,
    }
    originals = {name: getattr(_cli, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(_cli, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(_cli, name, original)
