"""What a user gives in Python in place of a config: loss terms, a teacher, batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fairchem_kd.distillation.config import DistillationConfig, loss_term
from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import unwrap
from fairchem_kd.losses.schedule import Schedule
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import EnsembleTeacher, LiveTeacher, Teacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

#: What fairchem's models of energies and forces give.
OUTPUTS: dict[str, dict[str, Any]] = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True},
}


def terms_of(losses: Any) -> dict[str, Any]:
    """Loss terms by name, of options by name or of names.

    Raises:
        UserError: a name or options that do not fit.
    """
    if isinstance(losses, str):
        losses = [losses]
    if not isinstance(losses, Mapping):
        try:
            losses = {str(name): {} for name in losses}
        except TypeError:
            raise UserError(
                f"losses is a {type(losses).__name__}, and not terms by name with their options."
            ) from None
    return {
        str(name): loss_term(str(name), given, "losses")
        for name, given in losses.items()
        if given is not None
    }


def check_steps(steps: Any, config: DistillationConfig) -> None:
    """Refuse schedules that end with a training whose length nobody gave.

    Raises:
        UserError: there is one, or ``steps`` is no number of steps.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps is {steps!r:.40}, and has to be a number of 1 or more.")
    for term in config.active_terms.values():
        if steps is None and term.schedule != Schedule():
            raise UserError(
                f"{term.where}.schedule needs the number of optimiser steps of the whole training: "
                "give `steps`."
            )


def teacher_of(given: Any, student: nn.Module, device: torch.device, precision: str) -> Teacher:
    """What teaches, out of what a user has.

    Raises:
        UserError: it cannot teach.
    """
    if isinstance(given, list | tuple) and given:
        members = [teacher_of(one, student, device, precision) for one in given]
        for one in members:
            if not isinstance(one, LiveTeacher):
                raise UserError(
                    "The members of an ensemble are checkpoints or models, and one of them is of "
                    f"the type {type(one).__name__}."
                )
        lives = [one for one in members if isinstance(one, LiveTeacher)]
        return EnsembleTeacher(lives) if len(lives) > 1 else lives[0]
    if isinstance(given, str | Path):
        given = FrozenModel.from_checkpoint(given, device=device, where="teacher")
    elif isinstance(given, nn.Module):
        model = unwrap(given)
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in model.parameters()):
            raise UserError(
                "Teacher and student share weights, and those of a teacher are frozen: give a copy "
                "(copy.deepcopy) as the teacher."
            )
        given = FrozenModel(model.to(device), Units({}, {}), OUTPUTS)
    if isinstance(given, FrozenModel):
        return LiveTeacher(given, precision)
    if not callable(getattr(given, "teach", None)):
        raise UserError(
            f"The teacher is a {type(given).__name__}: give the path of a checkpoint, a model or a "
            "fairchem_kd.Teacher."
        )
    return given


def check_batch(given: Any, where: str) -> None:
    """Refuse what is no batch: a single structure, or an item of a batch that was iterated over.

    Raises:
        UserError: it is none.
    """
    if not isinstance(getattr(given, "natoms", None), torch.Tensor):
        raise UserError(
            f"{where}: this is a {type(given).__name__}, and no batch of structures: collate them "
            "with fairchem.core.datasets.data_list_collater(structures, otf_graph=True)."
        )


def first_batches(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until so many structures have been seen.

    Raises:
        UserError: there is none, or they are something else.
    """
    seen = 0
    for batch in batches:
        check_batch(batch, "fit takes several batches")
        yield batch
        seen += len(batch.natoms)
        if seen >= samples:
            return
    if not seen:
        raise UserError("fit: there is no batch, so that no statistics can be had; give some.")
