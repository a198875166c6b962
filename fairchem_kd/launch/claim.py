"""A folder that one driver of trainings has to itself."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairchem_kd.errors import UserError


@contextmanager
def claimed(out: Path, taken: str) -> Iterator[int]:
    """Hold ``out`` for this process and the trainings that it starts; yields the lock.

    Args:
        out: the folder, which is made.
        taken: what to say where another process, or a training that one left behind, holds it.

    Raises:
        UserError: that.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(taken) from None
        yield file.fileno()
