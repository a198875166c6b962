"""One command in several processes, each of which does its part."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from fairchem_kd.errors import UserError


def run_parts(command: Sequence[str], number: int) -> None:
    """Run ``command --part I/N`` for every I side by side, and wait for all of them.

    Args:
        command: that takes ``--part``.
        number: of processes.

    Raises:
        UserError: one of them failed.
    """
    children = [
        subprocess.Popen([*command, "--part", f"{part + 1}/{number}"]) for part in range(number)
    ]
    try:
        failed = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
        raise
    if any(failed):
        raise UserError(
            f"{sum(map(bool, failed))} of {number} processes failed; what the others kept is kept. "
            "Start the same command again."
        )
