"""v2v_geometric: vectors compared by their lengths and the angles between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairchem_kd.losses.base import LossInputs, LossOptions, Part, masked_sum, register_loss
from fairchem_kd.losses.features import FeatureLoss
from fairchem_kd.losses.projection import PROJECTIONS
from fairchem_kd.ops import edge_to_node
from fairchem_kd.schema import option

_TINY = 1e-12  # under a square root: a vector of no length has a finite derivative


@dataclass
class GeometricOptions(LossOptions):
    """Options of v2v_geometric."""

    student: str = option("vector", help="the student's vector feature")
    teacher: str = option("vector", help="the teacher's vector feature, or an edge feature")
    projection: str = option("linear", choices=PROJECTIONS, help="student to teacher channels")
    standardize: bool = option(True, help="divide the teacher's feature by its rms; false: raw")
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")
    angle: float = option(0.5, ge=0, le=1, help="weight of the angles; 1 - angle of the lengths")


@register_loss("v2v_geometric")
class GeometricVectors(FeatureLoss):
    """Vector features by length and angle, which stay the same however a structure is turned.

    ``(1 - a) abs(|M v_s| - |v_t|) + a (1 - cos(M v_s, v_t))`` with ``a`` the weight ``angle``, norm
    and cosine over xyz; the mean over channels, then over each structure's atoms, then over
    structures (after arXiv 2306.14818 and its code).
    """

    Options: ClassVar[type[LossOptions]] = GeometricOptions
    default_coefficient: ClassVar[float] = 30.0
    form = "vector"

    def forward(self, inputs: LossInputs) -> list[Part]:
        student, teacher = self.projected(inputs), self.standardized(inputs)
        teacher = teacher.to(student.dtype)
        ours, theirs = _norms(student), _norms(teacher)
        cosine = (student * teacher).sum(1) / (ours * theirs)
        angle = self.options.angle
        values = ((1 - angle) * (ours - theirs).abs() + angle * (1 - cosine)).mean(1)  # (N,)
        batch, rows = inputs.batch, self.rows(inputs)
        counting = torch.ones_like(values) if rows is None else rows.to(values)
        both = torch.stack([torch.where(counting > 0, values, 0), counting], dim=1)
        sums, numbers = edge_to_node(both, batch.batch, len(batch.natoms)).unbind(1)
        return [Part("", 1.0, *masked_sum(sums / numbers.clamp(min=1), numbers > 0))]


def _norms(vectors: Tensor) -> Tensor:
    """``(N, C)``: lengths over xyz of ``(N, 3, C)``."""
    return (vectors.square().sum(1) + _TINY).sqrt()
