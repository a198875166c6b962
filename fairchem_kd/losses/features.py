"""Losses on hidden features: n2n, e2n, v2v (arXiv 2306.14818, section 3).

All compare ``M h_s`` with ``h_t``: M the projection on the student's side, ``h_t`` the teacher's
standardised feature. They differ in which features of the two models they take, and in form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features import GRAPH, Request
from fairchem_kd.losses.base import (
    ElementwiseOptions,
    LossInputs,
    LossOptions,
    Part,
    masked_sum,
    register_loss,
)
from fairchem_kd.losses.elementwise import elementwise, vectorwise
from fairchem_kd.losses.pairs import PairLoss
from fairchem_kd.losses.projection import PROJECTIONS, projection, without_shift
from fairchem_kd.losses.standardize import Standardizer
from fairchem_kd.schema import option

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec


@dataclass
class FeatureOptions(ElementwiseOptions):
    """Options of n2n; the defaults of e2n, v2v and e2e differ."""

    student: str = option("node", help="the student's feature: <feature>[@<layer>[+<layer>...]]")
    teacher: str = option("node", help="the teacher's feature, in the same form")
    projection: str = option("linear", choices=PROJECTIONS, help="student to teacher channels")
    standardize: bool = option(True, help="standardise the teacher's feature; false: raw")
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")


@dataclass
class E2NOptions(FeatureOptions):
    """Options of e2n."""

    teacher: str = option("edge", help="the teacher's edge feature, summed onto target atoms")


@dataclass
class V2VOptions(FeatureOptions):
    """Options of v2v."""

    student: str = option("vector", help="the student's vector feature")
    teacher: str = option("vector", help="the teacher's vector feature, or an edge feature")


class FeatureLoss(PairLoss):
    """The mean over atoms and channels (and xyz) of ``fn(M h_s, h_t)``."""

    Options: ClassVar[type[LossOptions]] = FeatureOptions
    default_coefficient: ClassVar[float] = 100.0
    telling: ClassVar[tuple[str, ...]] = ("standardize",)
    #: Whether it compares differences of atoms alone: a shift of the features changes nothing.
    of_differences: ClassVar[bool] = False

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self.projection: torch.nn.Module | None = None
        self.standardizer: Standardizer | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.options.standardize

    def make(self, student: FeatureSpec, teacher: FeatureSpec, generator: torch.Generator) -> None:
        if self.options.projection == "identity" and student.channels != teacher.channels:
            raise UserError(
                f"{self.where}.projection: identity needs equal channels, but the student's "
                f"'{student.address}' has {student.channels} and the teacher's "
                f"'{teacher.address}' has {teacher.channels}; use linear."
            )
        self.projection = projection(
            self.options.projection, self.form, student.channels, teacher.channels, generator
        )
        if self.of_differences:
            without_shift(self.projection)
        if self.options.standardize:
            name = f"The teacher's feature '{teacher.address}' ({self.where}.teacher)"
            self.standardizer = Standardizer(self.form, teacher.channels, name)

    def update_statistics(self, teacher: Mapping[Request, Tensor], batch: Any) -> None:
        if self.standardizer is not None:
            values = teacher[self.teacher_request]
            if self.options.atoms == "free":
                rows = batch.fixed == 0
                values = values[rows[teacher[GRAPH][:, 1]] if self.form == "edge" else rows]
            self.standardizer.update(values)

    def finalize_statistics(self) -> None:
        if self.standardizer is not None:
            try:
                self.standardizer.finalize()
            except ValueError as error:
                raise UserError(f"{error}: {self.where} cannot be standardised.") from error

    def projected(self, inputs: LossInputs) -> Tensor:
        """``M h_s``, in the teacher's channels."""
        assert self.projection is not None, "build() comes before the first batch"
        return self.projection(self.student_values(inputs))

    def standardized(self, inputs: LossInputs) -> Tensor:
        """``h_t``, standardised where it is to be."""
        teacher = self.teacher_values(inputs)
        return teacher if self.standardizer is None else self.standardizer(teacher)

    def compared(self, inputs: LossInputs) -> Tensor:
        """``fn(M h_s, h_t)`` of every element: ``(N, C)``, of vectors ``(N, 3, C)``."""
        return self.elementwise(self.projected(inputs), self.standardized(inputs))

    def elementwise(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Its ``fn`` of two tensors of one shape."""
        return elementwise(self.options.fn, student, teacher, self.options.delta)

    def forward(self, inputs: LossInputs) -> list[Part]:
        return [Part("", 1.0, *masked_sum(self.compared(inputs), self.rows(inputs)))]


@register_loss("n2n")
class NodeToNode(FeatureLoss):
    """Node features of the student against node features of the teacher."""


@register_loss("e2n")
class EdgeToNode(FeatureLoss):
    """Node features of the student against the teacher's edge features, summed onto targets.

    The teacher's edges are summed before anything else is done with them, so nothing of the size
    of its edges outlives its forward.
    """

    Options = E2NOptions


@register_loss("v2v")
class VectorToVector(FeatureLoss):
    """Vector features against vector features (edge features times unit vectors, summed).

    It is the same however a structure is turned: mae and huber are of the length of the difference
    of two vectors, of each atom and channel.
    """

    Options = V2VOptions
    form = "vector"

    def elementwise(self, student: Tensor, teacher: Tensor) -> Tensor:
        return vectorwise(self.options.fn, student, teacher, self.options.delta)
