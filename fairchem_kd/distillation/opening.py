"""The teacher that a config names: a checkpoint, several, or a store of what one has said."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch

from fairchem_kd.distillation.config import TeacherConfig
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.store.format import CARD
from fairchem_kd.teachers.ensemble import KEY, EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.training.ranks import file_seen

#: Whatever a config can name.
OpenTeacher: TypeAlias = LiveTeacher | EnsembleTeacher | RecordedTeacher


def open_teacher(config: TeacherConfig, device: torch.device) -> OpenTeacher | None:
    """The teacher; None where the config names none.

    Raises:
        UserError: its checkpoint or its store will not do.
    """
    if isinstance(config.checkpoint, list):
        members = [
            _live(path, config, device, f"{KEY}[{number}]")
            for number, path in enumerate(config.checkpoint)
        ]
        return EnsembleTeacher(members, config.lead)
    if config.checkpoint is not None:
        return _live(config.checkpoint, config, device, KEY)
    return RecordedTeacher(Path(config.store)) if config.is_recorded else None


def _live(path: str, config: TeacherConfig, device: torch.device, where: str) -> LiveTeacher:
    frozen = FrozenModel.from_checkpoint(
        path,
        trust=config.trust_checkpoint,
        elements=config.elements,
        device=device,
        where=where,
    )
    return LiveTeacher(frozen, config.precision)


def teacher_seen(config: TeacherConfig) -> dict[str, str]:
    """The teacher in short, which has to be the same on all ranks, by the key that names it."""
    if config.checkpoint is None and config.is_recorded:
        return {"task.distillation.teacher.store": file_seen(Path(config.store) / CARD)}
    if isinstance(config.checkpoint, list):
        return {f"{KEY}[{i}]": file_seen(path) for i, path in enumerate(config.checkpoint)}
    return {KEY: file_seen(config.checkpoint or "")}
