"""What both models say of some structures before the first step, for terms that want to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairchem_kd.losses import LossInputs
from fairchem_kd.training.checks import check_finite

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from fairchem_kd.distillation.statistics import Collate
    from fairchem_kd.distillation.terms import Distillation

SAMPLES = 8  # of the training set, evenly spread


@torch.no_grad()
def check_pair(distillation: Distillation, dataset: Dataset, collate: Collate) -> None:
    """Have the terms look that ask for it (`Loss.checks_pair`); neither model is changed.

    Raises:
        UserError: the pair gives one of them nothing to compare.
    """
    checking = [term for term in distillation.terms.values() if term.checks_pair]
    if not checking:
        return
    size = len(dataset)  # type: ignore[arg-type]
    number = min(SAMPLES, size)
    batch = collate([dataset[i * size // number] for i in range(number)])
    check_finite(batch, ())
    distillation.check_elements(batch.atomic_numbers)
    batch = batch.to(distillation.device)
    student, training = distillation.student, distillation.student.training
    student.eval()
    with distillation.tap_student() as features:
        student(batch.clone())
    student.train(training)
    taught = distillation.teacher.teach(batch, distillation.teacher_requests, outputs=False)
    ours = {request: features[request].values for request in distillation.student_tap.specs}
    inputs = LossInputs(batch, ours, taught.features)
    for term in checking:
        noted = [part for part in term(inputs) if part.weight is None]
        term.check_pair({p.name: float(p.total) / max(float(p.count or 1), 1.0) for p in noted})
