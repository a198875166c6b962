"""The teacher that a config names: a checkpoint, several, or a store of what one has said."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch

from fairchem_kd.distillation.config import DistillationConfig, TeacherConfig
from fairchem_kd.errors import UserError
from fairchem_kd.models.file import refuse_missing
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.store.format import CARD
from fairchem_kd.teachers.ensemble import KEY, EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.recorded import KEY as STORE
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.training.ranks import file_seen

#: Whatever a config can name.
OpenTeacher: TypeAlias = LiveTeacher | EnsembleTeacher | RecordedTeacher


def open_teacher(config: TeacherConfig, device: torch.device) -> OpenTeacher | None:
    """The teacher; None where the config names none.

    Raises:
        UserError: its checkpoint or its store will not do.
    """
    if isinstance(config.store, list):
        stores = [
            RecordedTeacher(Path(folder), f"{STORE}[{number}]")
            for number, folder in enumerate(config.store)
        ]
        return EnsembleTeacher(stores, config.lead)
    if isinstance(config.checkpoint, list):
        members = [
            _member(path, config, device, f"{KEY}[{number}]")
            for number, path in enumerate(config.checkpoint)
        ]
        return EnsembleTeacher(members, config.lead)
    if config.checkpoint is not None:
        return _live(config.checkpoint, config, device, KEY)
    return RecordedTeacher(Path(config.store)) if config.is_recorded else None


def refuse_missing_teacher(config: DistillationConfig) -> None:
    """Refuse a teacher whose file is not there, which costs nothing to know.

    Raises:
        UserError: it names the key and the file.
    """
    teacher = config.teacher
    if not config.active_terms or teacher.checkpoint is None:
        return
    several = isinstance(teacher.checkpoint, list)
    for number, path in enumerate(teacher.members if several else [str(teacher.checkpoint)]):
        try:
            refuse_missing(Path(path))
        except UserError as error:
            raise UserError(f"{KEY}[{number}]: {error}" if several else f"{KEY}: {error}") from None


def _member(
    path: str, config: TeacherConfig, device: torch.device, where: str
) -> LiveTeacher | RecordedTeacher:
    """A model, or where a folder is named the store of a teacher that is not here."""
    if Path(path).is_dir():
        return RecordedTeacher(Path(path), where)
    return _live(path, config, device, where)


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
    if isinstance(config.store, list):
        return {f"{STORE}[{i}]": _seen(Path(folder)) for i, folder in enumerate(config.store)}
    if isinstance(config.checkpoint, list):
        return {f"{KEY}[{i}]": _seen(Path(path)) for i, path in enumerate(config.checkpoint)}
    if config.is_recorded:
        return {STORE: file_seen(Path(config.store) / CARD)}
    return {KEY: file_seen(config.checkpoint or "")}


def _seen(path: Path) -> str:
    """A checkpoint, or of a folder the card of the store, in short."""
    return file_seen(path / CARD if path.is_dir() else path)
