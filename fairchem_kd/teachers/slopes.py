"""How a teacher's forces change with positions: products with the Jacobian of its forces.

No store has them: they are asked of the live model at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.models.frozen import shaped_outputs
from fairchem_kd.random_state import same_draws
from fairchem_kd.stock.positions import followed
from fairchem_kd.teachers.base import Teacher
from fairchem_kd.teachers.ensemble import EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.stored import StoredTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch


def live_members(teacher: Teacher) -> list[LiveTeacher]:
    """The models that can be differentiated, one or those of an ensemble.

    Raises:
        UserError: the teacher, or a member, is a store alone or something else without a model.
    """
    if isinstance(teacher, EnsembleTeacher):
        given: Sequence[object] = teacher.given
    else:
        given = [teacher.live if isinstance(teacher, StoredTeacher) else teacher]
    found = [one for one in given if isinstance(one, LiveTeacher)]
    if len(found) < len(given):
        raise UserError(
            "The slopes of a teacher's forces need its model, which a store alone does not have: "
            "give task.distillation.teacher.checkpoint; or in place of the loss jacobian take "
            "jacobian_antithetic, and in place of adversarial copies others."
        )
    return found


def force_slopes(teacher: Teacher, batch: Batch, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """For each ``(N, 3)`` of cotangents c the gradient of ``sum(c * F)``, ``(N, 3)``, in eV/Å².

    Of an ensemble that of its mean. The batch stays as it was.

    Args:
        batch: N atoms, on the teacher's device.
        cotangents: ``(N, 3)`` each; one that is 1 at a component of an atom's force and 0 elsewhere
            asks for the row of that component in the Jacobian.

    Raises:
        UserError: there is no model, or one whose forces cannot be differentiated.
    """
    _, slopes = forces_and_slopes(teacher, batch)
    return [slopes(one) for one in cotangents]


def forces_and_slopes(teacher: Teacher, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Forces ``(N, 3)`` in eV/Å, and what gives their slopes for a cotangent (`force_slopes`).

    Raises:
        UserError: as of `force_slopes`.
    """
    graphs = [_graph_of(one, batch) for one in live_members(teacher)]

    def slopes(cotangent: Tensor) -> Tensor:
        found = [
            torch.autograd.grad(forces, pos, cotangent.to(forces), retain_graph=True)[0]
            for forces, pos in graphs
        ]
        return torch.stack(found).mean(0)

    return torch.stack([forces.detach() for forces, _ in graphs]).mean(0), slopes


def _graph_of(live: LiveTeacher, batch: Batch) -> tuple[Tensor, Tensor]:
    """A model's forces, eV/Å, with their graph, and the positions at its other end."""
    frozen, device = live.frozen, batch.pos.device
    view = copy.copy(batch)  # models set keys
    pos = view.pos = batch.pos.detach().clone().requires_grad_(True)
    drawing = same_draws(device) if frozen.draws else nullcontext()
    following = followed(frozen.model)
    with torch.enable_grad(), live.computing(device.type), drawing, following:
        raw = shaped_outputs(
            frozen.model(view), {"forces": frozen.outputs["forces"]}, batch, frozen.name
        )["forces"]
        forces = frozen.units.physical("forces", raw.double(), batch)
    if not forces.requires_grad:
        raise UserError(
            f"The forces of {frozen.name} cannot be differentiated: take the loss "
            "jacobian_antithetic, which compares forces on pairs of rattled copies."
        )
    return forces, pos
