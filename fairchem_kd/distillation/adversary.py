"""Adversarial copies: structures moved to where student and teacher differ most.

Projected gradient ascent (Madry et al., ICLR 2018; for potentials arXiv 2306.14818, section 4) on

    sum over free atoms of |F_s - F_t|^2 / n  -  penalty * sum of |F_t| / n

of each structure of n free atoms, by products with the Jacobians of both models' forces:

    noise -> forces of both -> gradient at positions -> a step, bounded -> ... -> distances
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairchem_kd.distillation.companions import AdversarialOptions, Rattler
from fairchem_kd.errors import UserError
from fairchem_kd.models.frozen import shaped_outputs
from fairchem_kd.random_state import same_draws
from fairchem_kd.stock.positions import followed
from fairchem_kd.teachers.slopes import forces_and_slopes, live_members

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.distillation.terms import Distillation

_HALVINGS = 4  # of a way that brings atoms too close, before the copy stays where it began


class Adversary:
    """Moves copies on from where noise put them.

    What it does is a function of the copies and of both models alone. Neither model is changed: no
    gradient is written, and none of a step before enters the next.

    Args:
        distillation: of the training.
        rattler: what made the copies, whose distances they keep.

    Raises:
        UserError: one of the models has no forces, or the teacher no model.
    """

    def __init__(self, distillation: Distillation, rattler: Rattler) -> None:
        self.distillation = distillation
        self.rattler = rattler
        self.options = rattler.options.adversarial or AdversarialOptions()
        live_members(distillation.teacher)
        if "forces" not in distillation.targets or "forces" not in distillation.teacher.levels:
            raise UserError(
                "task.distillation.rattle.mode adversarial goes where forces differ, and student "
                "and teacher do not both predict 'forces': take another mode."
            )

    def __call__(self, copies: Batch) -> Batch:
        """The copies, in host memory, at other positions; fixed atoms stay where they are."""
        there = copy.copy(copies).to(self.distillation.device)
        start = there.pos.detach().clone()
        free = torch.ones_like(there.batch, dtype=torch.bool)
        if "fixed" in there:
            free = there.fixed == 0
        numbers = start.new_zeros(len(there.natoms)).index_add(0, there.batch, free.to(start))
        shares = torch.where(free, 1.0 / numbers.clamp(min=1)[there.batch], 0.0)[:, None]
        moved = torch.zeros_like(start)
        student = self.distillation.student
        training = student.training
        student.eval()
        try:
            for _ in range(self.options.steps):
                there.pos = start + moved
                gradient, theirs = self._gradient(there, shares)
                step = stepped(self.options, gradient, theirs).to(start)
                moved = bounded(moved + torch.where(free[:, None], step, 0.0), self.options.radius)
        finally:
            student.train(training)
        return self._kept_apart(copies, moved.to(copies.pos))

    def _gradient(self, batch: Batch, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is climbed, at positions, and the teacher's forces: ``(N, 3)`` each, float64.

        Args:
            shares: ``(N, 1)``, one over the number of free atoms of its structure; 0 of fixed ones.
        """
        distillation = self.distillation
        student = distillation.student
        view = copy.copy(batch)
        view.pos = batch.pos.detach().clone().requires_grad_(True)
        target = {"forces": distillation.targets["forces"]}
        with torch.enable_grad(), same_draws(view.pos.device), followed(student):
            ours = shaped_outputs(student(view), target, batch, "the student")["forces"]
            ours = distillation.units.physical("forces", ours.double(), batch)
        if not ours.requires_grad:
            raise UserError(
                "The student's forces cannot be differentiated with respect to positions, so that "
                "no copies can be adversarial: take another task.distillation.rattle.mode."
            )
        theirs, slopes = forces_and_slopes(distillation.teacher, batch)
        apart = 2 * shares * (ours.detach() - theirs)
        (first,) = torch.autograd.grad(ours, view.pos, apart)
        norms = theirs.norm(dim=1, keepdim=True).clamp(min=1e-12)
        against = self.options.force_penalty * shares * theirs / norms
        gradient = first.double() - slopes(apart + against).double()
        return torch.where(torch.isfinite(gradient), gradient, 0.0), theirs

    def _kept_apart(self, copies: Batch, moved: Tensor) -> Batch:
        """The copies moved, by less where that brings atoms too close, or not at all."""
        found = copy.copy(copies)
        scale = torch.ones(len(copies.natoms))
        for turn in range(_HALVINGS + 1):
            found.pos = copies.pos + scale[copies.batch].to(moved)[:, None] * moved
            close = torch.tensor(self.rattler.too_close(copies, found))
            if not bool(close.any()):
                return found
            scale = torch.where(close, scale / 2 if turn < _HALVINGS - 1 else 0.0, scale)
        return found


def stepped(options: AdversarialOptions, gradient: Tensor, forces: Tensor) -> Tensor:
    """One step, Å, ``(N, 3)``.

    Args:
        options: by what rule.
        gradient: of what is climbed, ``(N, 3)``.
        forces: the teacher's, ``(N, 3)``.
    """
    if options.off_force:
        along = torch.nn.functional.normalize(forces, dim=1)
        gradient = gradient - (gradient * along).sum(1, keepdim=True) * along
    if options.bound == "ball":
        return options.rate * gradient
    return options.rate * torch.nn.functional.normalize(gradient, dim=1, eps=1e-30)


def bounded(moved: Tensor, radius: float) -> Tensor:
    """Displacements ``(N, 3)``, Å, none longer than ``radius``."""
    norms = moved.norm(dim=1, keepdim=True)
    return moved * (radius / norms.clamp(min=1e-30)).clamp(max=1.0)
