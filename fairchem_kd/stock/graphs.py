"""Graphs without periodicity, for which stock needs a compiled package that hardly anybody has."""

from __future__ import annotations

import torch
from fairchem.core.models import base
from torch import Tensor


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int = 32,
    **_: object,
) -> Tensor:
    """Edges ``(2, E)`` between atoms of one structure within ``r``, by target atom.

    As torch_cluster's: row 0 the source, row 1 the target; of more than ``max_num_neighbors`` the
    nearest are kept (there, whichever were found first).

    Args:
        x: positions in Å, ``(N, 3)``.
        r: the cutoff in Å.
        batch: ``(N,)``, of which structure each atom is, in ascending order; None: of one.
        loop: whether an atom is its own neighbour.
        max_num_neighbors: of one atom.
    """
    sizes = [len(x)] if batch is None else torch.bincount(batch).tolist()
    edges, start = [], 0
    for size in sizes:
        pos = x[start : start + size].detach()
        distances = torch.cdist(pos, pos, compute_mode="donot_use_mm_for_euclid_dist")
        if not loop:
            distances.fill_diagonal_(torch.inf)
        nearest, order = distances.sort(dim=1, stable=True)
        inside = nearest[:, :max_num_neighbors] <= r
        targets, rank = inside.nonzero(as_tuple=True)
        sources = order[:, :max_num_neighbors][targets, rank]
        edges.append(torch.stack([sources, targets]) + start)
        start += size
    return torch.cat(edges, dim=1) if edges else x.new_zeros(2, 0, dtype=torch.long)


def use_our_radius_graph() -> None:
    """Have stock's models with ``use_pbc: false`` take it, where nothing compiled is installed."""
    try:
        import torch_cluster  # noqa: F401
    except ImportError:
        base.radius_graph = radius_graph
