"""What every loss has that compares a feature of the student with one of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features import GRAPH, Request
from fairchem_kd.losses.base import Labels, Loss, LossInputs, LossOptions

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec
    from fairchem_kd.features.address import Kind


class PairLoss(Loss):
    """A loss on one feature of each model, in one form.

    Its options have ``student`` and ``teacher``, addresses of features, and ``atoms``: all or free.
    """

    form: ClassVar[Kind] = "node"

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self.student_request = Request(self.options.student, self.form)
        self.teacher_request = Request(self.options.teacher, self.form)

    @classmethod
    def addresses(cls) -> dict[str, str]:
        options: Any = cls.Options()
        return {"student": options.student, "teacher": options.teacher}

    def graphs(self) -> tuple[bool, bool]:
        """Whether it needs the student's edges, and the teacher's."""
        return self.form == "edge", self.form == "edge"

    def student_requests(self) -> list[Request]:
        return [self.student_request, *([GRAPH] if self.graphs()[0] else [])]

    def teacher_requests(self) -> list[Request]:
        return [self.teacher_request, *([GRAPH] if self.graphs()[1] else [])]

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
        self.make(student, teacher, generator)

    def make(self, student: FeatureSpec, teacher: FeatureSpec, generator: torch.Generator) -> None:
        """Make the modules for two features of the right form.

        Raises:
            UserError: the two do not fit.
        """

    def student_values(self, inputs: LossInputs) -> Tensor:
        """The student's feature, in float32 where the student ran under autocast."""
        values = inputs.student[self.student_request]
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def teacher_values(self, inputs: LossInputs) -> Tensor:
        """The teacher's feature, without a gradient."""
        return inputs.teacher[self.teacher_request].detach()

    def rows(self, inputs: LossInputs) -> Tensor | None:
        """``(N,)``, true for the atoms that count; None: all."""
        return inputs.atoms(free=self.options.atoms == "free")
