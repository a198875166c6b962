"""Whether a run's folder takes its checkpoints, tried before the first step rather than after."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from fairchem_kd.errors import UserError

#: `checkpoint.pt`, the one before it, `best_checkpoint.pt`, and one that is being written.
CHECKPOINTS = 4
#: AdamW keeps two numbers for each weight, a third with amsgrad.
_OF_OPTIMISER = 3
_BESIDE = 1 << 20  # bytes of random states, config and records
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def size_of_checkpoint(model: nn.Module, *, averaged: bool) -> int:
    """About the bytes of a checkpoint of a training with this model.

    Args:
        model: with weights of any type.
        averaged: whether running averages of the weights are kept beside them.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return weights * (1 + averaged + _OF_OPTIMISER) + buffers + _BESIDE


def check_room(folder: str | os.PathLike[str], size: int) -> None:
    """Write a file of the size of a checkpoint, and remove it again.

    Args:
        folder: the run's, made where it is not there.
        size: of a checkpoint, in bytes.

    Raises:
        UserError: nothing can be written there, or too little.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < CHECKPOINTS * size:
            raise UserError(
                f"The run's folder {folder} has {free / 1e6:,.0f} MB free, and {CHECKPOINTS} "
                f"checkpoints of about {size / 1e6:,.0f} MB are written there: make room, or name "
                "another place with --run-dir."
            )
        _try_to_write(folder, size)
    except OSError as error:
        raise UserError(
            f"A checkpoint of about {size / 1e6:,.0f} MB cannot be written to the run's folder "
            f"{folder} ({error.strerror or error}): make room or mend its permissions, or name "
            "another place with --run-dir."
        ) from error


def _try_to_write(folder: Path, size: int) -> None:
    """Take the room for a file of that size: a quota or a limit shows in no free space."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".trial.", suffix=".part") as file:
        file.write(b"\0")
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
