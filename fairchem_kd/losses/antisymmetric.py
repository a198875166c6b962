"""antisymmetric: what keeps direct forces from being the slope of an energy, of the student alone.

Forces F are minus the slope of some energy if and only if their Jacobian J = dF/dx is symmetric: it
is then minus a Hessian. Of a head of its own for forces it is not. Random probes u and v show the
antisymmetric part by products alone, without any row of J:

    a(u, v) = u.(J v) - v.(J u) = u.(J - J^T) v        mean over probes of a^2 = |J - J^T|^2
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

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
from fairchem_kd.losses.elementwise import elementwise
from fairchem_kd.losses.relational import lots
from fairchem_kd.schema import option

_BITS = 3  # of a lot, for the axes of one probe


@dataclass
class AntisymmetricOptions(ElementwiseOptions):
    """Options of antisymmetric."""

    probes: int = option(
        2, ge=2, le=8, help="random directions at a step, each compared with each other one"
    )
    atoms: str = option("free", choices=("all", "free"), help="the atoms that probes move")
    seed: int = option(0, ge=0, help="of the directions, with the number of the step")


@register_loss("antisymmetric")
class Antisymmetric(Loss):
    """The antisymmetric part of the Jacobian of the student's forces, along random directions.

    The mean over structures and pairs (u, v) of probes of ``fn(u.(J v) - v.(J u), 0) / n``, with J
    the Jacobian of the student's normalised forces, per Å, and n the 3N components that probes
    have: with ``mse`` on average the squared length of a row of ``J - J^T``, whatever the size of a
    structure (of the other ``fn`` the difference is over the root of n). Probes are 1 or -1 in each
    component of the atoms that may move, which follow from ``seed``, the step and the atoms'
    positions, whatever the number of ranks. It asks nothing of the teacher; a step takes as many
    backwards more as there are probes, which are differentiated again.
    """

    Options: ClassVar[type[LossOptions]] = AntisymmetricOptions
    telling: ClassVar[tuple[str, ...]] = ("probes",)
    needs_own_slopes: ClassVar[bool] = True

    def compared_outputs(self, labels: Labels) -> tuple[str, ...]:
        if "forces" not in labels.outputs:
            raise UserError(
                f"{self.where} is about the student's forces, and outputs has no 'forces': take it "
                "out, or give the student forces."
            )
        return ()

    def forward(self, inputs: LossInputs) -> list[Part]:
        forces, pos = inputs.student_outputs["forces"], inputs.batch.pos
        if not (forces.requires_grad and pos.requires_grad):  # evaluation: there are no slopes
            return []
        probes = [one.to(forces) for one in self.directions(inputs)]
        slopes = [torch.autograd.grad(forces, pos, u, create_graph=True)[0] for u in probes]
        moved = 3 * self._moving(inputs).to(forces)  # (N,), components
        number = self._of_structures(moved, inputs)  # (B,), components
        scale = number.clamp(min=1).rsqrt()
        rows = number > 0 if inputs.systems is None else inputs.systems & (number > 0)
        total, count = forces.new_zeros(()), torch.zeros((), device=forces.device)
        for later, v in enumerate(probes):
            for u, of_u in zip(probes[:later], slopes[:later], strict=True):
                difference = ((of_u * v).sum(1) - (slopes[later] * u).sum(1)).to(moved)
                found = scale * self._of_structures(difference, inputs)
                values = elementwise(
                    self.options.fn, found, torch.zeros_like(found), self.options.delta
                )
                some, counted = masked_sum(values, rows)
                total, count = total + some, count + counted
        return [Part("", 1.0, total, count)]

    def directions(self, inputs: LossInputs) -> list[Tensor]:
        """The probes, ``(N, 3)`` each: 1 or -1, and 0 on atoms that do not move."""
        pos = inputs.batch.pos
        told = f"{self.options.seed}/{inputs.step}".encode()
        seed = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "little")
        own = torch.arange(len(pos), device=pos.device)
        drawn = lots(pos, torch.stack([own, own], 1), seed)[:, None]
        bits = torch.arange(_BITS * self.options.probes, device=pos.device)
        signs = (1 - 2 * ((drawn >> bits) & 1)).to(pos.dtype)  # (N, 3 probes)
        signs = signs * self._moving(inputs)[:, None]
        return list(signs.split(_BITS, dim=1))

    def _moving(self, inputs: LossInputs) -> Tensor:
        """``(N,)``: the atoms that probes move."""
        fixed = inputs.batch.fixed
        return fixed == 0 if self.options.atoms == "free" else torch.ones_like(fixed).bool()

    def _of_structures(self, values: Tensor, inputs: LossInputs) -> Tensor:
        """Sums of ``(N,)`` over each structure, ``(B,)``."""
        batch = inputs.batch
        return values.new_zeros(len(batch.natoms)).index_add(0, batch.batch, values)
