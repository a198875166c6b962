"""Stock's checkpoints, written so that a crash leaves the one before, and with a key of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairchem.core.trainers import base_trainer

from fairchem_kd.models.file import write_checkpoint
from fairchem_kd.training.resume import previous_of


@contextmanager
def checkpoints_written_with(extra: dict[str, Any]) -> Iterator[None]:
    """Within the block, stock's ``save`` writes ``extra`` into the file too, and writes it safely.

    ``BaseTrainer.save`` builds its dictionary and writes it in place: there is no hook for another
    key, and a crash while it writes leaves a truncated file. Its only way out is the function
    ``save_checkpoint`` of its module, which is replaced for the time of the call. Of a file from
    which a run goes on, one with ``extra``, the one before is kept.
    """

    def save_checkpoint(
        state: dict[str, Any], checkpoint_dir: str = "checkpoints/", checkpoint_file: str = ""
    ) -> str:
        path = os.path.join(checkpoint_dir, checkpoint_file)
        write_checkpoint({**state, **extra}, path, previous=previous_of(path) if extra else None)
        return path

    original = base_trainer.save_checkpoint
    base_trainer.save_checkpoint = save_checkpoint
    try:
        yield
    finally:
        base_trainer.save_checkpoint = original
