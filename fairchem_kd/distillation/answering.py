"""Where the answers of a training's teacher come from: its store, those of its members, or it.

a model                -> a store that is filled, or the model itself (`keeping`)
a store and nothing else -> that store, which has to hold all (`relying`)
an ensemble            -> of each member one of both
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fairchem_kd.distillation.companions import Companions
from fairchem_kd.distillation.config import TeacherConfig
from fairchem_kd.distillation.keeping import Wanted, keep
from fairchem_kd.distillation.opening import OpenTeacher
from fairchem_kd.distillation.relying import refuse_new_copies, rely
from fairchem_kd.features import Request
from fairchem_kd.teachers.base import Teacher
from fairchem_kd.teachers.ensemble import EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.place import AUTO, OFF
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import StoredTeacher


@dataclass(frozen=True)
class Answering:
    """What a training asks of its teacher, and where it stands."""

    requests: Sequence[Request]  #: the features that are kept with the outputs
    wanted: Sequence[Wanted]  #: the structures
    companions: Companions | None
    run_dir: str  #: where runs make their folders
    device: torch.device
    part: tuple[int, int] | None  #: which of how many parts is filled; None: this rank's
    stop: Callable[[], bool]  #: whether to leave early, at the next group of structures


def kept_answers(
    teacher: OpenTeacher, config: TeacherConfig, asked: Answering
) -> StoredTeacher | EnsembleTeacher | None:
    """What reads the answers from here on; None where the teacher is asked at every step.

    A collective. A store is one teacher's, so that other trainings with that teacher, alone or in
    another ensemble, read it too. Of members whose features are not compared it holds outputs
    alone.

    Args:
        teacher: as it was opened.
        config: ``task.distillation.teacher``; stores of members share its ``max_gb``, and where
            ``store`` is a folder, each has one in it.
        asked: about what.

    Raises:
        UserError: a store that will not do, or structures that the teacher cannot be asked about.
    """
    if not isinstance(teacher, EnsembleTeacher):
        return _one(teacher, config, asked)
    share = config.max_gb / max(len(teacher.lives), 1)
    for number, member in enumerate(teacher.given):
        own = config
        if isinstance(member, LiveTeacher):
            own = dataclasses.replace(
                config, checkpoint=None, ensemble=None, store=_place(config, member), max_gb=share
            )
        requests = asked.requests if number == teacher.lead else ()
        kept = _one(member, own, dataclasses.replace(asked, requests=requests))
        if kept is not None:
            teacher.members[number] = kept
    return teacher if teacher.stores else None


def _one(
    teacher: LiveTeacher | RecordedTeacher, config: TeacherConfig, asked: Answering
) -> StoredTeacher | None:
    if isinstance(teacher, RecordedTeacher):
        refuse_new_copies(asked.companions)
        return rely(teacher, asked.requests, asked.wanted)
    return keep(
        teacher,
        asked.requests,
        config,
        asked.wanted,
        run_dir=asked.run_dir,
        device=asked.device,
        part=asked.part,
        stop=asked.stop,
    )


def _place(config: TeacherConfig, member: LiveTeacher) -> str:
    """The store of a member, as a config would name it."""
    store = str(config.store)
    if store.strip().lower() in (AUTO, OFF):
        return store
    return str(Path(store) / member.digest[:16])


def folders_of(teacher: Teacher) -> list[Path]:
    """The stores that a teacher reads."""
    stores = teacher.stores if isinstance(teacher, EnsembleTeacher) else [teacher]
    return [one.folder for one in stores if isinstance(one, StoredTeacher)]
