"""Keep what each member of an ensemble says, in a store of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fairchem_kd.distillation.config import TeacherConfig
from fairchem_kd.features import Request
from fairchem_kd.teachers.ensemble import EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.place import AUTO, OFF
from fairchem_kd.teachers.stored import StoredTeacher

Keep = Callable[[LiveTeacher, Sequence[Request], TeacherConfig], StoredTeacher | None]


def keep_members(
    teacher: EnsembleTeacher, requests: Sequence[Request], config: TeacherConfig, keep: Keep
) -> EnsembleTeacher | None:
    """The ensemble, whose members read their stores where they have one; None where none has.

    A store is one teacher's, so that other trainings with that teacher, alone or in another
    ensemble, read it too. Of those whose features are not compared it holds outputs alone.

    Args:
        teacher: all members live.
        requests: the features of the one whose features are compared.
        config: ``task.distillation.teacher``: the stores share its ``max_gb``, and where ``store``
            is a folder, each has one in it.
        keep: of one member (:func:`fairchem_kd.distillation.keeping.keep`).
    """
    share = config.max_gb / len(teacher.lives)
    for number, live in enumerate(teacher.lives):
        store = config.store
        if store.strip().lower() not in (AUTO, OFF):
            store = str(Path(store) / live.digest[:16])
        own = dataclasses.replace(config, store=store, max_gb=share)
        kept = keep(live, requests if number == teacher.lead else (), own)
        if kept is not None:
            teacher.members[number] = kept
    return teacher if teacher.stores else None
