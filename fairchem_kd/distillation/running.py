"""Whether schedules fit the length of a training."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fairchem_kd.distillation.config import LabelLoss
from fairchem_kd.errors import UserError
from fairchem_kd.losses import Loss


def check_schedules(terms: Mapping[str, Loss], labels: LabelLoss, last_step: int) -> None:
    """Refuse a training with steps at which nothing is learned; warn of a warm-up without an end.

    Args:
        terms: by name.
        labels: what the labels count.
        last_step: of the training.

    Raises:
        UserError: naming the first such step.
    """
    schedules = [term.schedule for term in terms.values()]
    if labels.coefficient > 0:
        schedules.append(labels.schedule)
    ends = {0, *(place for one in schedules for place in one.span(last_step))}
    for step in sorted(place + 1 for place in ends if place < last_step):
        if not any(one.runs(step, last_step) for one in schedules):
            raise UserError(
                f"task.distillation: at step {step} of {last_step} neither the labels nor "
                "a loss counts, by their schedules' start and stop: let one of them go on."
            )
    for term in terms.values():
        if term.schedule.warmup_steps >= last_step > 1:
            logging.warning(
                f"{term.where}.schedule.warmup_steps is {term.schedule.warmup_steps}, and the "
                f"training has {last_step} steps: the loss never counts in full."
            )
