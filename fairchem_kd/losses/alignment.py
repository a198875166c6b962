"""The cka loss: node features that are alike up to rotations and one scale, as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fairchem_kd.features import FeatureSpec
from fairchem_kd.losses.base import LossInputs, LossOptions, Part, register_loss
from fairchem_kd.losses.gather import gather_rows
from fairchem_kd.losses.hsic import cka
from fairchem_kd.losses.pairs import PairLoss
from fairchem_kd.schema import option


@dataclass
class CKAOptions(LossOptions):
    """Options of cka."""

    student: str = option("node", help="the student's feature: <feature>[@<layer>[+<layer>...]]")
    teacher: str = option("node", help="the teacher's feature, or an edge feature, summed")
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")


@register_loss("cka")
class LinearCKA(PairLoss):
    """One minus the linear CKA of two node features, over the atoms of all ranks.

    The estimator is the unbiased one (:mod:`fairchem_kd.losses.hsic`): of unrelated features the
    loss is about 1, by chance a little more, where the plain estimator (arXiv 2306.14818, section
    3) falls with the width of the features whatever they are. There is no projection, since CKA
    does not change when a feature is rotated or scaled, and no standardising. A batch with fewer
    than four atoms that count, or in which a feature does not vary, teaches nothing and is
    recorded as 0.
    """

    Options: ClassVar[type[LossOptions]] = CKAOptions
    default_coefficient: ClassVar[float] = 10.0

    def make(self, student: FeatureSpec, teacher: FeatureSpec, generator: torch.Generator) -> None:
        """Nothing is learned and nothing fitted: any two widths fit."""

    def forward(self, inputs: LossInputs) -> list[Part]:
        rows = self.rows(inputs)
        student, teacher = self.student_values(inputs), self.teacher_values(inputs)
        if rows is not None:
            student, teacher = student[rows], teacher[rows]
        # gathered in float32, and then in float64: of many atoms large sums nearly cancel
        student, teacher = gather_rows(student).double(), gather_rows(teacher).double()
        # every rank has the whole value, so each counts once; without one the sum is empty
        value = cka(student, teacher)
        if bool(value.isnan()):
            return [Part("", 1.0, 0.0 * student.sum(), 0)]
        return [Part("", 1.0, 1.0 - value, 1)]
