"""How forces change with positions: rows of the Jacobian, and differences on antithetic pairs.

Both ask the student for the teacher's curvature (Hessian distillation; Amin, Raja and
Krishnapriyan, ICLR 2025), the first exactly on sampled rows, the second along directions that
rattled copies give:

    J = dF/dx, (3N, 3N)       row (a, k) of J = gradient of F_a,k     J v ~ (F(x+hv) - F(x-hv)) / 2h
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.losses.base import (
    ElementwiseOptions,
    Labels,
    Loss,
    LossInputs,
    LossOptions,
    Part,
    masked_sum,
    register_loss,
)
from fairchem_kd.losses.elementwise import elementwise, vectorwise
from fairchem_kd.losses.relational import lots
from fairchem_kd.schema import option

_SMALL = 1e-6  # Å: a pair that is not further apart tells nothing


class _OfForces(Loss):
    """What a loss on the slopes of forces asks of labels and outputs."""

    @property
    def needs_outputs(self) -> tuple[str, ...]:
        return ("forces",)

    def compared_outputs(self, labels: Labels) -> tuple[str, ...]:
        for name, where in (("outputs", labels.outputs), ("the teacher's", labels.taught)):
            if where is not None and "forces" not in where:
                raise UserError(
                    f"{self.where} compares how forces change, and {name} has no 'forces': take it "
                    "out, or give both models forces."
                )
        return ("forces",)

    def _rows(self, inputs: LossInputs) -> Tensor | None:
        return inputs.atoms(free=self.options.atoms == "free")


@dataclass
class JacobianOptions(ElementwiseOptions):
    """Options of jacobian."""

    rows: int = option(
        1, ge=1, le=64, help="of each structure's Jacobian at a step; drawn anew at every step"
    )
    atoms: str = option(
        "free", choices=("all", "free"), help="whose forces and positions are meant"
    )
    seed: int = option(0, ge=0, help="of the choice of rows, with the number of the step")


@register_loss("jacobian")
class Jacobian(_OfForces):
    """Rows of the Jacobian of forces with respect to positions, drawn at every step.

    The mean of ``fn(dF_s,a,k / dx_b,l, dF_t,a,k / dx_b,l)`` over the atoms b and axes l of a
    structure, for components (a, k) of its forces that are drawn: those with the highest lots,
    which follow from ``seed``, the step and the atoms' positions, whatever the number of ranks. In
    the student's normalised forces per Å. A step takes a backward more of each model for each row,
    the student's one that is differentiated again, and one more forward of the live teacher.
    """

    Options: ClassVar[type[LossOptions]] = JacobianOptions
    telling: ClassVar[tuple[str, ...]] = ("rows",)
    needs_slopes: ClassVar[bool] = True

    def forward(self, inputs: LossInputs) -> list[Part]:
        forces, pos = inputs.student_outputs["forces"], inputs.batch.pos
        if not (forces.requires_grad and pos.requires_grad):  # evaluation: there are no slopes
            return []
        assert inputs.teacher_slopes is not None, "the teacher's slopes come with the batch"
        cotangents = [self._cotangent(inputs, row).to(forces) for row in range(self.options.rows)]
        counting = self._rows(inputs)
        total, count = forces.new_zeros(()), torch.zeros((), device=forces.device)
        for own, theirs in zip(cotangents, inputs.teacher_slopes(cotangents), strict=True):
            (ours,) = torch.autograd.grad(forces, pos, own, create_graph=True)
            finite = torch.isfinite(theirs).all(1)
            rows = finite if counting is None else finite & counting
            theirs = torch.where(rows[:, None], theirs, 0.0).to(ours)
            values = elementwise(self.options.fn, ours, theirs, self.options.delta)
            some, number = masked_sum(values, rows)
            total, count = total + some, count + number
        return [Part("", 1.0, total, count)]

    def _cotangent(self, inputs: LossInputs, row: int) -> Tensor:
        """``(N, 3)``: 1 at one component of the force of one atom of each structure.

        Of structures without an atom that may be drawn there is none.
        """
        batch, pos = inputs.batch, inputs.batch.pos
        told = f"{self.options.seed}/{inputs.step}/{row}".encode()
        seed = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "little")
        own = torch.arange(len(pos), device=pos.device)
        drawn = lots(pos, torch.stack([own, own], 1), seed)
        if self.options.atoms == "free":
            drawn = torch.where(batch.fixed == 0, drawn, torch.iinfo(torch.long).min)
        best = drawn.new_full((len(batch.natoms),), torch.iinfo(torch.long).min)
        best = best.scatter_reduce(0, batch.batch, drawn, "amax")
        chosen = (drawn == best[batch.batch]) & (drawn > torch.iinfo(torch.long).min)
        axis = (best >> 7) % 3  # bits of the lot that do not decide
        axes = torch.arange(3, device=pos.device)
        return (chosen[:, None] & (axis[batch.batch][:, None] == axes)).to(pos.dtype)


@dataclass
class AntitheticOptions(ElementwiseOptions):
    """Options of jacobian_antithetic."""

    atoms: str = option("free", choices=("all", "free"), help="the atoms whose forces are compared")


@register_loss("jacobian_antithetic")
class JacobianAntithetic(_OfForces):
    """Differences of forces between the two copies of an antithetic pair, over their distance.

    The mean over atoms and axes (mae and huber: of lengths, over atoms) of ``fn((F_s(x + hv) -
    F_s(x - hv)) / 2h, (F_t(x + hv) - F_t(x - hv)) / 2h)``, with ``v`` of rms 1 over the atoms that
    may move, in the student's normalised forces per Å. It needs ``rattle.antithetic: true``, no
    second derivative, and nothing of the teacher but forces, which a store has.
    """

    Options: ClassVar[type[LossOptions]] = AntitheticOptions
    needs_pairs: ClassVar[bool] = True

    def forward(self, inputs: LossInputs) -> list[Part]:
        student = inputs.student_outputs["forces"]
        batch: Any = inputs.batch
        pairs = batch.get("pairs") if hasattr(batch, "get") else getattr(batch, "pairs", None)
        if pairs is None:  # evaluation: there are no copies
            return []
        if not len(pairs):
            return [Part("", 1.0, 0.0 * student.sum(), 0)]
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        teacher = inputs.teacher_outputs["forces"].detach().to(student.dtype)
        plus, minus, of = pairs.unbind(1)
        half = (batch.pos[plus] - batch.pos[minus]).detach().double() / 2
        moved = (batch.fixed[plus] == 0).to(half)
        square = half.new_zeros(len(batch.natoms), 2)  # more rooms than there are pairs
        square = square.index_add(0, of, torch.stack([half.square().sum(1), 3 * moved], 1))
        length = (square[:, 0] / square[:, 1].clamp(min=1)).sqrt()  # h of each pair, Å
        far = length > _SMALL
        scale = (2 * length.clamp(min=_SMALL)).to(student)[of][:, None]
        ours = (student[plus] - student[minus]) / scale
        theirs = (teacher[plus] - teacher[minus]) / scale
        values = vectorwise(self.options.fn, ours, theirs, self.options.delta)
        rows = far[of]
        counting = self._rows(inputs)
        if counting is not None:
            rows = rows & counting[plus] & counting[minus]
        return [Part("", 1.0, *masked_sum(values, rows))]


def pair_atoms(natoms: Tensor, pairs: Tensor) -> Tensor:
    """The atoms of structures that are compared in pairs, for ``batch.pairs``.

    Args:
        natoms: ``(B,)``, in host memory.
        pairs: ``(P, 2)``, the numbers of the two structures, of as many atoms, of each pair.

    Returns:
        ``(A, 3)``: an atom of the first, the same of the second, the number of the pair.
    """
    starts = (natoms.cumsum(0) - natoms).tolist()
    sizes = natoms.tolist()
    rows = [torch.zeros(0, 3, dtype=torch.long)]
    for number, (first, second) in enumerate(pairs.tolist()):
        within = torch.arange(sizes[first])
        own = torch.full_like(within, number)
        rows.append(torch.stack([starts[first] + within, starts[second] + within, own], 1))
    return torch.cat(rows)
