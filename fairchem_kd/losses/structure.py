"""gsp and lsp: the student keeps how the teacher's atoms lie to each other, not where they lie.

Only distances between features of atoms of one model are compared, so that widths need not agree
and nothing is projected unless that is asked for (arXiv 2306.14818, section 3; the local form is
that of Yang et al. 2020, arXiv 2003.10477).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairchem_kd.features import GRAPH
from fairchem_kd.losses.base import LossInputs, LossOptions, Part, masked_sum, register_loss
from fairchem_kd.losses.elementwise import FUNCTIONS
from fairchem_kd.losses.features import FeatureLoss
from fairchem_kd.losses.projection import NONE, PROJECTIONS
from fairchem_kd.ops import edge_to_node
from fairchem_kd.schema import option

_TINY = 1e-12  # under a square root: its derivative stays finite where two features are equal


@dataclass
class StructureOptions(LossOptions):
    """What gsp and lsp have."""

    student: str = option("node", help="the student's feature: <feature>[@<layer>[+<layer>...]]")
    teacher: str = option("node", help="the teacher's feature, or an edge feature, summed")
    projection: str = option(
        NONE, choices=(NONE, *PROJECTIONS), help="of the student's feature, before distances"
    )
    standardize: bool = option(True, help="standardise the teacher's feature; false: raw")
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")


@dataclass
class GSPOptions(StructureOptions):
    """Options of gsp."""

    fn: str = option("mse", choices=FUNCTIONS, help="how two distances are compared")
    delta: float = option(1.0, gt=0, help="huber only: where the square ends and the line begins")


@register_loss("gsp")
class GlobalStructure(FeatureLoss):
    """Distances of the features of all pairs of atoms of a structure (global structure preserving).

    The mean over pairs of different atoms of each structure of ``fn(d_s, d_t)``, where ``d`` is the
    mean over channels of the squared difference of two atoms' features.
    """

    Options: ClassVar[type[LossOptions]] = GSPOptions
    of_differences = True

    def forward(self, inputs: LossInputs) -> list[Part]:
        batch, rows = inputs.batch, self.rows(inputs)
        largest = int(batch.natoms.max()) if len(batch.natoms) else 0  # waits for the device
        number = torch.arange(len(batch.batch), device=batch.natoms.device)
        starts = batch.natoms.cumsum(0) - batch.natoms
        place = batch.batch * largest + number - starts[batch.batch]
        slots = len(batch.natoms), largest

        def padded(values: Tensor) -> Tensor:
            whole = values.new_zeros(slots[0] * slots[1], *values.shape[1:])
            return whole.index_copy(0, place, values).view(*slots, *values.shape[1:])

        there = torch.ones_like(number, dtype=torch.bool) if rows is None else rows
        there = padded(there)
        pairs = there[:, :, None] & there[:, None, :]
        pairs = pairs & ~torch.eye(largest, dtype=torch.bool, device=pairs.device)
        student = _squared_distances(padded(self.projected(inputs)), there)
        teacher = _squared_distances(padded(self.standardized(inputs)), there)
        values = self.elementwise(student, teacher)
        return [Part("", 1.0, *masked_sum(values.view(-1), pairs.view(-1)))]


def _squared_distances(features: Tensor, there: Tensor) -> Tensor:
    """``(B, n, n)``: means over channels of squared differences of the rows of ``(B, n, C)``."""
    features = torch.where(there[:, :, None], features, 0)
    # what cancels below becomes small; distances stay
    centre = features.sum(1, keepdim=True) / there.sum(1).clamp(min=1)[:, None, None]
    features = features - centre
    squares = features.square().sum(-1)
    products = features @ features.transpose(1, 2)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * products
    return distances / features.shape[-1]


@dataclass
class LSPOptions(StructureOptions):
    """Options of lsp."""

    edges: str = option(
        "student", choices=("student", "teacher"), help="whose edges are an atom's neighbourhood"
    )
    temperature: float = option(1.0, gt=0, help="what distances are divided by before the softmax")


@register_loss("lsp")
class LocalStructure(FeatureLoss):
    """Which neighbours' features are far from an atom's own (local structure preserving).

    For each atom a softmax over the edges into it of the distance of the two ends' features, the
    root of the mean over channels of their squared difference; the mean over atoms with edges of
    ``KL(teacher || student)``. With a plain norm in place of the mean, as in arXiv 2306.14818,
    wide features would make each softmax a choice of one neighbour: ``temperature: 1/sqrt(C)`` is
    that.
    """

    Options: ClassVar[type[LossOptions]] = LSPOptions
    of_differences = True

    def graphs(self) -> tuple[bool, bool]:
        return self.options.edges == "student", self.options.edges == "teacher"

    def forward(self, inputs: LossInputs) -> list[Part]:
        side = inputs.student if self.options.edges == "student" else inputs.teacher
        source, target = side[GRAPH][:, 0], side[GRAPH][:, 1].contiguous()
        number = len(inputs.batch.batch)
        student = self._log_shares(self.projected(inputs), source, target, number)
        teacher = self._log_shares(self.standardized(inputs), source, target, number)
        parts = teacher.exp() * (teacher - student)
        divergence = edge_to_node(parts[:, None], target, number)[:, 0]
        degree = torch.zeros_like(divergence).index_add(0, target, torch.ones_like(parts))
        rows, counting = self.rows(inputs), degree > 0
        return [
            Part("", 1.0, *masked_sum(divergence, counting if rows is None else counting & rows))
        ]

    def _log_shares(self, features: Tensor, source: Tensor, target: Tensor, number: int) -> Tensor:
        """``(E,)``: logarithms of the softmax over the edges into each atom."""
        difference = features.index_select(0, source) - features.index_select(0, target)
        distances = (difference.square().mean(1) + _TINY).sqrt() / self.options.temperature
        largest = distances.new_full((number,), -torch.inf)
        largest = largest.scatter_reduce(0, target, distances.detach(), "amax")
        shifted = distances - largest[target]  # at most 0, and 0 for one edge of each atom
        sums = edge_to_node(shifted.exp()[:, None], target, number)[:, 0]
        return shifted - sums[target].log()
