"""Edges of a batch by structure: which belong to which, in an order that is a structure's own.

Edges are rows of :data:`fairchem_kd.features.GRAPH`, ``(E, 5)``: source, target and cell offset.
Both ends of an edge are atoms of one structure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def systems_of(graph: Tensor, natoms: Tensor) -> Tensor:
    """``(E,)``: which of the B structures each edge is of."""
    systems = torch.arange(len(natoms), device=natoms.device)
    return torch.repeat_interleave(systems, natoms)[graph[:, 1]]


def pick_edges(graph: Tensor, natoms: Tensor, structures: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The edges of some structures, in the order in which these are named.

    Returns:
        Which rows of ``graph`` they are ``(E',)``, and the rows ``(E', 5)`` with the atoms numbered
        as in a batch of these structures alone.
    """
    belongs = systems_of(graph, natoms)
    starts = natoms.cumsum(0) - natoms
    chosen, picked, start = [], [], 0
    for system in structures:
        rows = (belongs == system).nonzero()[:, 0]
        edges = graph[rows].clone()
        edges[:, :2] += start - starts[system]
        chosen.append(rows)
        picked.append(edges)
        start += int(natoms[system])
    if not chosen:
        return graph.new_zeros(0), graph[:0]
    return torch.cat(chosen), torch.cat(picked)


def by_ends(graph: Tensor) -> Tensor:
    """``(E,)``: the order of edges by target, source and offset.

    It does not depend on what else is in a batch, and puts the edges of each structure together.
    """
    order = torch.arange(len(graph), device=graph.device)
    for column in (4, 3, 2, 0, 1):  # stable sorts, the first key last
        order = order[torch.argsort(graph[order, column], stable=True)]
    return order
