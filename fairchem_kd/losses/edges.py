"""e2e: edge features against edge features, on the edges that both models have.

Student and teacher make their own graphs, with cutoffs and limits of neighbours of their own, and
list the edges in orders of their own. An edge of one is an edge of the other where source, target
and cell offset are the same (arXiv 2306.14818, section 3, compares edges in the order in which they
are listed, which takes one graph for both).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features import GRAPH
from fairchem_kd.losses.base import LossInputs, LossOptions, Part, masked_sum, register_loss
from fairchem_kd.losses.features import FeatureLoss, FeatureOptions
from fairchem_kd.schema import option

#: Cell offsets of edges are smaller than this; a cell would have to be 0.1 Å wide to have others.
FARTHEST = 100
MATCHED = "matched"  # the part that is recorded: the share of the student's edges


def match_edges(student: Tensor, teacher: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Which of the teacher's edges each of the student's is, without waiting for the device.

    Args:
        student: ``(E_s, 5)``: source, target, cell offset, each edge once.
        teacher: ``(E_t, 5)``, the same.
        num_atoms: N, of both.

    Returns:
        Rows of ``teacher`` ``(E_s,)``, whichever where there is none, and whether there is one
        ``(E_s,)``.
    """
    if len(teacher) == 0:
        return student.new_zeros(len(student)), student.new_zeros(len(student), dtype=torch.bool)
    ours, theirs = _numbered(student, num_atoms), _numbered(teacher, num_atoms)
    known, order = theirs.sort()
    place = torch.searchsorted(known, ours).clamp(max=len(known) - 1)
    near = student[:, 2:].abs().amax(1) < FARTHEST
    return order[place], (known[place] == ours) & near


def _numbered(edges: Tensor, num_atoms: int) -> Tensor:
    """``(E,)``: a number for each edge, the same for the same edge; of up to a million atoms."""
    source, target, *offsets = edges.long().unbind(1)
    number = target * num_atoms + source
    for offset in offsets:
        number = number * (2 * FARTHEST + 1) + offset.clamp(-FARTHEST, FARTHEST) + FARTHEST
    return number


@dataclass
class E2EOptions(FeatureOptions):
    """Options of e2e."""

    student: str = option("edge", help="the student's edge feature")
    teacher: str = option("edge", help="the teacher's edge feature")
    atoms: str = option("all", choices=("all", "free"), help="the target atoms whose edges count")
    min_matched: float = option(
        0.3, ge=0, le=1, help="the share of the student's edges that the teacher must have"
    )


@register_loss("e2e")
class EdgeToEdge(FeatureLoss):
    """Edge features against edge features, on the edges that both graphs have.

    The mean over matched edges and channels of ``fn(M m_s, m_t)``. The share of the student's edges
    that the teacher has is in the records; a pair with a smaller one than ``min_matched`` is
    refused before the first step. A store keeps the teacher's edges whole, which takes 30 to 50
    times the room of sums over them.
    """

    Options: ClassVar[type[LossOptions]] = E2EOptions
    form = "edge"
    checks_pair = True

    def forward(self, inputs: LossInputs) -> list[Part]:
        ours, theirs = inputs.student[GRAPH], inputs.teacher[GRAPH]
        place, matched = match_edges(ours, theirs, len(inputs.batch.atomic_numbers))
        student, teacher = self.projected(inputs), self.standardized(inputs)
        if len(theirs) == 0:
            teacher = teacher.new_zeros(1, teacher.shape[1])
        values = self.elementwise(student, teacher[place])
        rows = self.rows(inputs)
        counting = torch.ones_like(matched) if rows is None else rows[ours[:, 1]]
        both = matched & counting
        share = Part(MATCHED, None, both.sum(), counting.sum())
        return [Part("", 1.0, *masked_sum(values, both)), share]

    def check_pair(self, found: Mapping[str, float]) -> None:
        share, needed = found[MATCHED], self.options.min_matched
        if share < needed or share == 0:
            raise UserError(
                f"{self.where}: of the student's edges the teacher has {share:.0%}, and "
                f"{self.where}.min_matched is {needed:g}: give both models the same cutoff and "
                "limit of neighbours, or take e2n, which needs no common edges."
            )
