"""A training whose teacher is a store alone: all that it will ask has to be there before step 1."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fairchem_kd.distillation.companions import Companions
from fairchem_kd.distillation.keeping import Wanted
from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
from fairchem_kd.store.failures import FAILED
from fairchem_kd.teachers.answers import structures_of
from fairchem_kd.teachers.filling import Source, is_marked, note_filled
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import StoredTeacher
from fairchem_kd.training.ranks import rank, refused_by_all

#: Of a source, of whose structures no more may have failed than this share.
MOST_FAILED = 0.5


def rely(
    teacher: RecordedTeacher, requests: Sequence[Request], wanted: Sequence[Wanted]
) -> StoredTeacher:
    """The teacher that reads the store, which holds all that the training will want.

    A collective: the first rank looks, and all of them are refused.

    Args:
        teacher: of whom there is a store.
        requests: the features that are read with the outputs.
        wanted: what the training will ask.

    Raises:
        UserError: something is missing, with the command that fills it.
    """
    stored = StoredTeacher(teacher, teacher.folder, requests, teacher.columns(requests))
    logging.info(
        f"The teacher is what {teacher.name} has said, in {teacher.folder}; nobody is asked live"
    )
    with refused_by_all():
        if rank() == 0:
            _look(stored, teacher, [want.source for want in wanted])
    stored.reader.refresh()
    return stored


def _look(stored: StoredTeacher, teacher: RecordedTeacher, sources: Sequence[Source]) -> None:
    """Refuse a store that lacks something of these.

    Raises:
        UserError: it does; or the teacher could say nothing of most of a source.
    """
    lacking, whole = [], []
    for source in sources:
        if is_marked(stored.folder, stored.names, source):
            continue
        structures = missing = failed = 0
        for group in range(source.groups):
            batch = source.make(group)
            if batch is None:
                continue
            for structure in structures_of(batch):
                key = structure.key()
                structures += 1
                if not stored.reader.has(key, stored.names):
                    failed += key in teacher.failed
                    missing += key not in teacher.failed
        if missing:
            lacking.append(f"{missing} of {structures} structures of {source.name}")
            continue
        whole.append(source)
        if failed:
            logging.warning(
                f"{failed} of {structures} structures of {source.name} do not count for the "
                f"teacher's losses: it could say nothing of them ({stored.folder / FAILED})"
            )
        if failed > MOST_FAILED * structures:
            raise UserError(
                f"{teacher.where}: the teacher could say nothing of {failed} of {structures} "
                f"structures of {source.name} ({stored.folder / FAILED} says why): mend that and "
                f"ask again with {teacher.mend} and --retry, or take other structures."
            )
    if lacking:
        raise UserError(
            f"{teacher.where}: {stored.folder} lacks {', '.join(lacking)}, and without "
            f"teacher.checkpoint nobody can be asked: {teacher.mend} fills it."
        )
    note_filled(stored.folder, stored.names, whole)


def refuse_new_copies(companions: Companions | None) -> None:
    """Refuse rattled copies that are new at every step, about which nobody could be asked.

    Raises:
        UserError: there are such.
    """
    rattler = companions.rattler if companions is not None else None
    if rattler is not None and rattler.pool is None:
        raise UserError(
            "task.distillation.rattle.pool is null, so that copies are new at every step, and "
            "teacher.store without teacher.checkpoint leaves nobody to ask about them: give a "
            "pool, such as 8."
        )
