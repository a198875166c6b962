"""The `fairchem` command: stock's, and what this package adds to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairchem_kd.commands.terminal import on_any_terminal
from fairchem_kd.errors import UserError, report
from fairchem_kd.stock.noise import drop_noise
from fairchem_kd.stock.plugin import check_fairchem_core


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairchem` command and return its exit code."""
    return on_any_terminal(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    try:
        check_fairchem_core()
    except UserError as error:
        return report(error)
    from fairchem_kd.launch import run
    from fairchem_kd.sweep.grid import sweep_grid

    drop_noise()
    try:
        return run.main(argv, sweep_grid)
    except KeyboardInterrupt as stop:
        told = str(stop) or (
            "stopped at once; a training with a checkpoint goes on from there with --timestamp-id "
            "and the name of its run's folder"
        )
        print(f"\n{told}", file=sys.stderr)
        return 130
