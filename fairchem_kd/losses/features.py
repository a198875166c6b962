"""Losses on hidden features: n2n, e2n, v2v (arXiv 2306.14818, section 3).

All compare ``M h_s`` with ``h_t``: M the projection on the student's side, ``h_t`` the teacher's
standardised feature. They differ in which features of the two models they take, and in form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
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
from fairchem_kd.losses.projection import PROJECTIONS, projection
from fairchem_kd.losses.standardize import Standardizer
from fairchem_kd.schema import option

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec


@dataclass
class FeatureOptions(ElementwiseOptions):
    """Options of n2n; the defaults of e2n and v2v differ."""

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


class FeatureLoss(Loss):
    """The mean over atoms and channels (and xyz) of ``fn(M h_s, h_t)``."""

    Options: ClassVar[type[LossOptions]] = FeatureOptions
    default_coefficient: ClassVar[float] = 100.0
    telling: ClassVar[tuple[str, ...]] = ("standardize",)
    form: ClassVar[Literal["node", "vector"]] = "node"

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self.student_request = Request(self.options.student, self.form)
        self.teacher_request = Request(self.options.teacher, self.form)
        self.projection: torch.nn.Module | None = None
        self.standardizer: Standardizer | None = None

    @classmethod
    def addresses(cls) -> dict[str, str]:
        options: Any = cls.Options()
        return {"student": options.student, "teacher": options.teacher}

    def student_requests(self) -> list[Request]:
        return [self.student_request]

    def teacher_requests(self) -> list[Request]:
        return [self.teacher_request]

    @property
    def needs_statistics(self) -> bool:
        return self.options.standardize

    def build(
        self,
        student_specs: Mapping[Request, FeatureSpec],
        teacher_specs: Mapping[Request, FeatureSpec],
        generator: torch.Generator,
        labels: Labels | None = None,
    ) -> None:
        student, teacher = student_specs[self.student_request], teacher_specs[self.teacher_request]
        for side, spec in (("student", student), ("teacher", teacher)):
            if spec.kind != self.form:
                raise UserError(
                    f"{self.where}.{side}: {self.kind} compares {self.form} features, but "
                    f"'{spec.address}' of the {side} is of the kind {spec.kind}."
                )
        if self.options.projection == "identity" and student.channels != teacher.channels:
            raise UserError(
                f"{self.where}.projection: identity needs equal channels, but the student's "
                f"'{student.address}' has {student.channels} and the teacher's "
                f"'{teacher.address}' has {teacher.channels}; use linear."
            )
        self.projection = projection(
            self.options.projection, self.form, student.channels, teacher.channels, generator
        )
        if self.options.standardize:
            name = f"The teacher's feature '{teacher.address}' ({self.where}.teacher)"
            self.standardizer = Standardizer(self.form, teacher.channels, name)

    def update_statistics(self, teacher: Mapping[Request, Tensor], batch: Any) -> None:
        if self.standardizer is not None:
            values = teacher[self.teacher_request]
            self.standardizer.update(
                values[batch.fixed == 0] if self.options.atoms == "free" else values
            )

    def finalize_statistics(self) -> None:
        if self.standardizer is not None:
            try:
                self.standardizer.finalize()
            except ValueError as error:
                raise UserError(f"{error}: {self.where} cannot be standardised.") from error

    def compared(self, inputs: LossInputs) -> Tensor:
        """``fn(M h_s, h_t)`` of every element: ``(N, C)``, of vectors ``(N, 3, C)``."""
        assert self.projection is not None, "build() comes before the first batch"
        student = inputs.student[self.student_request]
        # a half type where the student ran under autocast; the projection and the loss do not
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        student = self.projection(student)
        teacher = inputs.teacher[self.teacher_request].detach()
        if self.standardizer is not None:
            teacher = self.standardizer(teacher)
        return elementwise(self.options.fn, student, teacher, self.options.delta)

    def rows(self, inputs: LossInputs) -> Tensor | None:
        """``(N,)``, true for the atoms that count; None: all."""
        return inputs.atoms(free=self.options.atoms == "free")

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

    With mse the loss is invariant under rotations; with mae and huber, which look at x, y and z one
    by one, it depends on how a structure is turned, as the MAE of force components does.
    """

    Options = V2VOptions
    form = "vector"
