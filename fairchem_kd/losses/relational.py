"""relational: the student tells the teacher's pairs of atoms apart (InfoNCE on differences).

A pair of neighbours is described by the difference of their features, z_i - z_j, and the student's
difference has to be nearer to the teacher's of the same pair than to those of other pairs. Such a
term is part of ARK (2025), on the OC20 data; InfoNCE is that of van den Oord et al. (2018, arXiv
1807.03748).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairchem_kd.features import GRAPH
from fairchem_kd.losses.base import LossInputs, LossOptions, Part, register_loss
from fairchem_kd.losses.features import FeatureLoss
from fairchem_kd.losses.gather import gather_rows
from fairchem_kd.losses.projection import PROJECTIONS
from fairchem_kd.schema import option

_TINY = 1e-8  # of norms: a difference of nothing has no direction


@dataclass
class RelationalOptions(LossOptions):
    """Options of relational."""

    student: str = option("node", help="the student's feature: <feature>[@<layer>[+<layer>...]]")
    teacher: str = option("node", help="the teacher's feature, or an edge feature, summed")
    projection: str = option("linear", choices=PROJECTIONS, help="student to teacher channels")
    standardize: bool = option(True, help="standardise the teacher's feature; false: raw")
    atoms: str = option("all", choices=("all", "free"), help="the atoms that count")
    edges: str = option(
        "student", choices=("student", "teacher"), help="whose edges are the pairs of neighbours"
    )
    temperature: float = option(0.15, gt=0, help="what cosines are divided by")
    pairs: int = option(
        1024, ge=2, le=16384, help="pairs of a step over all ranks, at most; others are left out"
    )
    seed: int = option(0, ge=0, help="of the choice of pairs, with the number of the step")


@register_loss("relational")
class Relational(FeatureLoss):
    """Differences of neighbours' features, told apart by InfoNCE.

    The mean over pairs p of ``-log(exp(cos(r_s,p, r_t,p) / T) / sum_q exp(cos(r_s,p, r_t,q) / T))``
    with ``r = z_i - z_j`` of the two atoms and T the temperature. Pairs are those of an edge, each
    direction once however many images of an atom are near; of more than ``pairs`` so many are drawn
    anew at every step: those with the lowest lots, which follow from ``seed``, the step and the
    atoms' positions, whatever the number of ranks. The table of cosines takes ``pairs``^2 numbers.
    """

    Options: ClassVar[type[LossOptions]] = RelationalOptions
    default_coefficient: ClassVar[float] = 1.0
    of_differences = True

    def graphs(self) -> tuple[bool, bool]:
        return self.options.edges == "student", self.options.edges == "teacher"

    def forward(self, inputs: LossInputs) -> list[Part]:
        side = inputs.student if self.options.edges == "student" else inputs.teacher
        pairs = self._chosen(
            neighbours(side[GRAPH], self.rows(inputs)), inputs.batch.pos, inputs.step
        )
        ours = gather_rows(_directions(self.projected(inputs), pairs))
        theirs = gather_rows(_directions(self.standardized(inputs).to(ours), pairs))
        if len(ours) < 2:  # with nothing to be told apart from
            return [Part("", 1.0, 0.0 * ours.sum(), 0)]
        cosines = ours @ theirs.T / self.options.temperature
        same = torch.arange(len(ours), device=ours.device)
        # every rank has the whole value, so each counts once
        return [Part("", 1.0, torch.nn.functional.cross_entropy(cosines, same), 1)]

    def _chosen(self, pairs: Tensor, pos: Tensor, step: int) -> Tensor:
        """Those of this rank's ``(P, 2)`` that are drawn out of the pairs of all ranks."""
        # torch's generators would make the draw depend on how structures are dealt out to ranks
        digest = hashlib.blake2b(f"{self.options.seed}/{step}".encode(), digest_size=7).digest()
        own = lots(pos, pairs, int.from_bytes(digest, "little"))
        everyone = gather_rows(own)
        if len(everyone) <= self.options.pairs:
            return pairs
        return pairs[own <= everyone.kthvalue(self.options.pairs).values]


def lots(pos: Tensor, pairs: Tensor, seed: int) -> Tensor:
    """``(P,)``: a pseudo-random number for each pair, out of where its atoms are and the seed.

    The mixing is that of SplitMix64 (Steele et al. 2014), with sums and products modulo 2^64.
    """

    def mixed(state: Tensor) -> Tensor:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return state ^ ((state >> 31) & ((1 << 33) - 1))

    bits = pos.detach().float().contiguous().view(torch.int32).long()
    of_atoms = torch.full_like(bits[:, 0], seed)
    for component in bits.unbind(1):
        of_atoms = mixed(of_atoms ^ component)
    # the second atom goes in differently from the first: a pair and its reverse are two
    return mixed(mixed(of_atoms[pairs[:, 0]]) + of_atoms[pairs[:, 1]])


def neighbours(graph: Tensor, rows: Tensor | None) -> Tensor:
    """The pairs of different atoms ``(P, 2)`` that have an edge: source, target; by target.

    Args:
        graph: ``(E, 5)``.
        rows: ``(N,)``, true where an atom counts: both of a pair have to; None: all.
    """
    ends = graph[:, :2]
    keep = ends[:, 0] != ends[:, 1]  # an atom and its own image do not differ
    if rows is not None:
        keep = keep & rows[ends].all(1)
    return torch.unique(ends[keep].flip(1), dim=0).flip(1)


def _directions(features: Tensor, pairs: Tensor) -> Tensor:
    """``(P, C)``: unit vectors along the differences of two atoms' features."""
    difference = features.index_select(0, pairs[:, 0]) - features.index_select(0, pairs[:, 1])
    return torch.nn.functional.normalize(difference, dim=1, eps=_TINY)
