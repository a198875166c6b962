"""A folder that one driver of trainings has to itself."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairchem_kd.errors import UserError


@contextmanager
def claimed(out: Path, taken: str, *, patience: float = 0.0) -> Iterator[int]:
    """Hold ``out`` for this process and the trainings that it starts; yields the lock.

    Args:
        out: the folder, which is made.
        taken: what to say where another process, or a training that one left behind, holds it.
        patience: seconds for which it may be held still.

    Raises:
        UserError: that.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        end = time.monotonic() + patience
        while not _is_locked(file.fileno()):
            if time.monotonic() >= end:
                raise UserError(taken)
            time.sleep(0.2)
        yield file.fileno()


def _is_locked(file: int) -> bool:
    """Whether it is, now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
