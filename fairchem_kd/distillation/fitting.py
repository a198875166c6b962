"""What is fitted, and looked at, on the training set before the first step.

zero of energies -> the teacher on the labels -> spreads -> statistics -> do the two go together
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fairchem_kd.distillation.agreement import Agreement, tell_agreement
from fairchem_kd.distillation.companions import Companions
from fairchem_kd.distillation.distiller import Distiller
from fairchem_kd.distillation.first_look import check_pair
from fairchem_kd.distillation.slopes import check_slopes
from fairchem_kd.training.ranks import rank, refused_by_all

if TYPE_CHECKING:
    from fairchem_kd.distillation.statistics import Collate
    from fairchem_kd.distillation.terms import Distillation


def fit_to(
    distiller: Distiller,
    companions: Companions | None,
    dataset: Any,
    collate: Collate,
    *,
    agreement: bool = True,
) -> None:
    """Fit what depends on a training set, and refuse what cannot be learned on it; a collective.

    Args:
        distiller: with a teacher whose answers are kept, where they are to be.
        companions: whose structures have to fit a zero of energies too.
        dataset: of the training.
        collate: makes a batch of samples.
        agreement: whether to say how the teacher does on the labels.

    Raises:
        UserError: on every rank, naming what does not go together.
    """
    distillation = distiller.distillation
    _fit_zero(distillation, companions, dataset, collate)
    distillation.fit_spreads(dataset, collate)  # a member that is wrong is named before their mean
    with refused_by_all():
        if rank() == 0 and agreement:
            found = distillation.agreement(dataset, collate)
            compared = distillation.compared_outputs
            tell_agreement(found, distillation.compares_energies, compared)
    distiller.fit_on(dataset, collate)
    with refused_by_all():
        if rank() == 0:
            check_pair(distillation, dataset, collate)
            check_slopes(distillation, dataset, collate)


def _fit_zero(
    distillation: Distillation, companions: Companions | None, dataset: Any, collate: Collate
) -> None:
    if distillation.zero_of != "labels":
        return
    if not distillation.compares_energies:
        logging.info(
            "No loss compares energies, so task.distillation.teacher.energy_zero does nothing"
        )
        return
    distillation.fit_zero(dataset, collate)
    with refused_by_all():
        if companions is not None and companions.unlabelled is not None:
            companions.unlabelled.check(distillation.check_elements)


def look_at_labels(
    distillation: Distillation | None, dataset: Any, collate: Collate
) -> tuple[Agreement | None, bool]:
    """How a teacher does on the labels as they are, in a try of a training in one process.

    Where its energies are compared and only another zero keeps them from the labels, they are
    shifted from here on, and the second value is true.
    """
    if distillation is None:
        return None, False
    found = distillation.agreement(dataset, collate)
    shifted = found is not None and found.other_zero and distillation.compares_energies
    if shifted:
        distillation.fit_zero(dataset, collate)
    return found, shifted


def tell_untaught(distillation: Distillation) -> None:
    """Say of which targets the teacher says nothing."""
    if left_out := distillation.not_taught:
        logging.info(
            f"The teacher does not predict {', '.join(left_out)}: the student learns it from "
            "its labels, and from the teacher's features where a loss compares them"
        )
