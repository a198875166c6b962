"""A teacher's outputs as the student would give them, so that both are judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fairchem_kd.distillation.terms import Distillation
from fairchem_kd.teachers import EnsembleTeacher, Teacher
from fairchem_kd.teachers.stored import MISSING, StoredTeacher
from fairchem_kd.training.restartable import Predict

if TYPE_CHECKING:
    from torch_geometric.data import Batch


def prediction_of(distillation: Distillation, targets: Mapping[str, Mapping[str, Any]]) -> Predict:
    """What predicts as the teacher does, in the student's units; nothing where nobody can say.

    Args:
        distillation: of the training.
        targets: the trainer's ``output_targets``.
    """

    def predict(batch: Batch) -> dict[str, Tensor]:
        teacher = distillation.teacher
        if not _can_say(teacher, batch):
            return {}
        passing: AbstractContextManager[None] = nullcontext()
        if isinstance(teacher, StoredTeacher | EnsembleTeacher):
            passing = teacher.asked_in_passing()
        with passing:
            taught = teacher.teach(batch, distillation.teacher_requests)
        if distillation.zero is not None:
            taught = distillation.zero.applied(taught, batch)
        said = taught.outputs
        rows = {"system": len(batch.natoms), "atom": len(batch.pos)}
        return {
            name: distillation.units.normalized(
                name, said[name].view(rows[target["level"]], -1), batch
            ).float()
            for name, target in targets.items()
            if name in said
        }

    return predict


def _can_say(teacher: Teacher, batch: Batch) -> bool:
    """Whether a teacher says something of all structures of a batch; one that is here does."""
    stores: list[Teacher] = [teacher]
    if isinstance(teacher, EnsembleTeacher):
        stores = [*teacher.members]
    return not any(
        isinstance(one, StoredTeacher)
        and not one.live.is_here
        and one.said(batch.clone().to("cpu"))[MISSING]
        for one in stores
    )
