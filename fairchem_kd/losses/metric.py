"""n2n_by_head and v2v_by_head: features compared by what the teacher's head makes of them.

The last layer of GemNet-OC is linear: energies of atoms are ``w . x_E``, and forces sums over
edges of ``w . x_F`` times unit vectors, so ``w . v`` of the teacher's vector feature. Of all ways
in which a feature can be off, one shows in the output; the others show in no output at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.losses.base import LossInputs, LossOptions, Part, masked_sum, register_loss
from fairchem_kd.losses.features import FeatureLoss
from fairchem_kd.losses.projection import PROJECTIONS
from fairchem_kd.losses.standardize import Standardizer
from fairchem_kd.schema import option

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec, Request


@dataclass
class ByHeadOptions(LossOptions):
    """Options of n2n_by_head."""

    student: str = option("node", help="the student's feature: <feature>[@<layer>[+<layer>...]]")
    teacher: str = option("node", help="the teacher's feature, which a linear head reads")
    projection: str = option("linear", choices=PROJECTIONS, help="student to teacher channels")
    standardize: bool = option(
        True, help="standardise the teacher's feature and what its head makes of it; false: raw"
    )
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")
    epsilon: float = option(0.1, ge=0, help="weight of differences that the head does not see")


@dataclass
class VectorsByHeadOptions(ByHeadOptions):
    """Options of v2v_by_head."""

    student: str = option("vector", help="the student's vector feature")
    teacher: str = option("vector", help="the teacher's vector feature, which a linear head reads")


class ByHead(FeatureLoss):
    """The mean of ``(w . d)^2 / s^2 + epsilon |d|^2`` with ``d = M h_s - h_t``.

    ``w`` are the weights of the head, ``s`` is the spread of ``w . h_t`` (1 without standardising),
    and ``|d|^2`` a mean over the channels of the standardised feature.
    """

    readout: Tensor

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self.head: Standardizer | None = None

    def make(self, student: FeatureSpec, teacher: FeatureSpec, generator: torch.Generator) -> None:
        if teacher.readout is None:
            raise UserError(
                f"{self.where}.teacher: no linear head of the teacher reads "
                f"'{teacher.address}' alone; GemNet-OC has one for node, and where its direct "
                "forces are not coupled one for vector; for other features take "
                f"{self.kind.partition('_')[0]}."
            )
        super().make(student, teacher, generator)
        # the teacher's, not learned and not saved: it comes with the teacher
        self.register_buffer("readout", teacher.readout.detach().clone().float(), persistent=False)
        if self.options.standardize:
            name = f"What the teacher's head makes of '{teacher.address}' ({self.where}.teacher)"
            self.head = Standardizer(self.form, 1, name)

    def update_statistics(self, teacher: Mapping[Request, Tensor], batch: Any) -> None:
        super().update_statistics(teacher, batch)
        if self.head is not None:
            values = teacher[self.teacher_request]
            if self.options.atoms == "free":
                values = values[batch.fixed == 0]
            self.head.update(values @ self.readout.to(values)[:, None])

    def finalize_statistics(self) -> None:
        super().finalize_statistics()
        if self.head is not None:
            self.head.finalize()

    def forward(self, inputs: LossInputs) -> list[Part]:
        difference = self.projected(inputs) - self.standardized(inputs)
        weights, spread = self.readout.to(difference), difference.new_ones(())
        if self.standardizer is not None and self.head is not None:
            weights = weights * self.standardizer.scale.to(difference)
            spread = self.head.scale.to(difference)[0]
        seen = (difference @ weights / spread).square()  # (N,), of vectors (N, 3)
        rows, epsilon = self.rows(inputs), self.options.epsilon
        rest = Part("rest", epsilon, *masked_sum(difference.square(), rows))
        return [Part("", 1.0, *masked_sum(seen, rows)), rest]


@register_loss("n2n_by_head")
class NodesByHead(ByHead):
    """Node features by what the teacher's energy head makes of their difference.

    ``mean (w . d)^2 / s^2 + epsilon mean |d|^2`` with ``d = M h_s - h_t``, ``w`` the weights of the
    head and ``s`` the spread of what it makes.
    """

    Options: ClassVar[type[LossOptions]] = ByHeadOptions


@register_loss("v2v_by_head")
class VectorsByHead(ByHead):
    """Vector features by what the teacher's force head makes of their difference; as n2n_by_head.

    Both of its sums are the same however a structure is turned.
    """

    Options: ClassVar[type[LossOptions]] = VectorsByHeadOptions
    form = "vector"
