"""The edges of stock's models from one neighbour search to the next, for dynamics.

Stock searches in every forward: it compares every atom with every other in every image within
reach. Here one search with a longer reach serves as long as no atom has moved by half of what it is
longer by; each forward takes from its edges those within the cutoff, compared as stock compares and
in stock's order, and so computes with the very numbers that stock's own search gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairchem.core.common.utils import get_max_neighbors_mask
from fairchem.core.models import base
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.stock.search import MEND, repetitions

Array = NDArray[np.float64]

_MOST = 2e8  # neighbours, or atoms and images of them, that are searched
_ROUNDING = 1e-4  # Å by which a search reaches further, for positions in float32
#: Å²: stock takes atoms nearer than that for one and the same.
_SAME_ATOM = 1e-4


@dataclass
class _Reach:
    """The edges within one cutoff and the skin, as stock's search orders them."""

    edge_index: Tensor  # (2, E): source, target
    cell_offsets: Tensor  # (E, 3)
    offsets: Tensor  # (E, 3), Å
    system: Tensor  # (E,): of which structure
    most: int  #: of the edges that end at one atom


class ReusedGraphs:
    """Gives one model its graphs out of searches that are done seldom.

    The model is one with ``use_pbc`` and ``otf_graph``; otherwise its own graphs are left to it. It
    must be asked about the same structures, moved by at most ``skin`` / 2 since :meth:`renew`: who
    holds this has to see to that.

    Args:
        backbone: the stock model, or the backbone of a hydra.
        skin: Å by which a search reaches further than the cutoff.
    """

    def __init__(self, backbone: Any, skin: float) -> None:
        self.backbone = backbone
        self.skin = skin
        self._known: dict[float, _Reach] = {}
        self.works = bool(getattr(backbone, "use_pbc", False)) and not getattr(
            backbone, "use_pbc_single", False
        )
        if self.works:
            self.backbone.generate_graph = self._graph  # of this instance alone

    def renew(self) -> None:
        """Search anew in the next forward: other structures, or ones that have moved too far."""
        self._known.clear()

    def _graph(
        self,
        data: Any,
        cutoff: float | None = None,
        max_neighbors: int | None = None,
        use_pbc: bool | None = None,
        otf_graph: bool | None = None,
        enforce_max_neighbors_strictly: bool | None = None,
        use_pbc_single: bool = False,
    ) -> base.GraphData:
        """In place of the model's ``generate_graph``, with the same result."""
        cutoff = cutoff or self.backbone.cutoff
        most = max_neighbors or self.backbone.max_neighbors
        strictly = enforce_max_neighbors_strictly
        if strictly is None:
            strictly = getattr(self.backbone, "enforce_max_neighbors_strictly", True)
        reach = self._known.get(cutoff)
        if reach is None:
            reach = self._known[cutoff] = _search(data, cutoff + self.skin)
        source, target = reach.edge_index
        positions = data.pos
        with torch.no_grad():
            # to the bit as the search compares: the image of the source, then its way to the target
            apart = positions.detach()[target] - (positions.detach()[source] + reach.offsets)
            squares = (apart * apart).sum(dim=1)
            kept = ((squares <= cutoff * cutoff) & (squares > _SAME_ATOM)).nonzero().squeeze(1)
            if reach.most > most:
                mask, _ = get_max_neighbors_mask(
                    natoms=data.natoms,
                    index=target[kept],
                    atom_distance=squares[kept],
                    max_num_neighbors_threshold=most,
                    enforce_max_strictly=strictly,
                )
                kept = kept[mask]
        edge_index, offsets = reach.edge_index[:, kept], reach.offsets[kept]
        vectors = positions[edge_index[0]] - positions[edge_index[1]]
        vectors = vectors + offsets
        distances = vectors.norm(dim=-1)
        if distances.requires_grad:
            distances = distances.clone()  # stock's PaiNN writes to it
        return base.GraphData(
            edge_index=edge_index,
            edge_distance=distances,
            edge_distance_vec=vectors,
            cell_offsets=reach.cell_offsets[kept],
            offset_distances=offsets,
            neighbors=torch.bincount(reach.system[kept], minlength=len(data.natoms)),
            node_offset=0,
            batch_full=data.batch,
            atomic_numbers_full=data.atomic_numbers.long(),
        )


def _search(data: Any, reach: float) -> _Reach:
    """Every edge within ``reach`` (Å), in the order of stock's search.

    That compares all atoms with all others in all images; a tree finds the same edges in time and
    memory that grow with the atoms.

    Raises:
        UserError: there are too many atoms in too small a cell.
    """
    cells = data.cell.detach().view(-1, 3, 3).double().cpu().numpy()
    natoms = data.natoms.tolist()
    given = data.get("pbc")
    pbc = np.ones((len(natoms), 3), bool) if given is None else given.view(-1, 3).cpu().numpy()
    positions = np.split(data.pos.detach().double().cpu().numpy(), np.cumsum(natoms)[:-1])
    indices, images, start = [], [], 0
    for system, where in enumerate(positions):
        edges, shifts = _neighbours(where, cells[system], pbc[system], reach)
        indices.append(edges + start)
        images.append(shifts)
        start += len(where)
    device = data.pos.device
    edge_index = torch.from_numpy(np.concatenate(indices, axis=1)).to(device)
    cell_offsets = torch.from_numpy(np.concatenate(images)).float().to(device)
    of_edge = data.batch[edge_index[1]]
    its_cell = data.cell.view(-1, 3, 3)[of_edge].float()
    offsets = cell_offsets.view(-1, 1, 3).bmm(its_cell).view(-1, 3)
    counts = torch.bincount(edge_index[1], minlength=1)
    return _Reach(edge_index, cell_offsets, offsets, of_edge, int(counts.max()))


def _neighbours(
    positions: Array, cell: Array, pbc: Array, reach: float
) -> tuple[NDArray[np.int64], Array]:
    """Edges ``(2, E)``, source and target, of one structure, and the sources' cells ``(E, 3)``.

    Ordered by target, source, and cell.

    Args:
        positions: Å, ``(N, 3)``, in the cell along periodic axes.
        cell: Å, ``(3, 3)``.
        pbc: ``(3,)``.
        reach: Å.
    """
    to_each_side = repetitions(cell[None], pbc[None], reach)[0].astype(int)
    number = len(positions) * float(np.prod(2.0 * to_each_side + 1))
    volume = abs(np.linalg.det(cell)) if pbc.all() else np.inf
    pairs = len(positions) ** 2 * 4.19 * reach**3 / volume if volume > 0 else 0.0
    if max(number, pairs) > _MOST:
        raise UserError(
            f"The neighbours within {reach:g} Å of {len(positions)} atoms in {volume:.3g} Å^3 are "
            f"about {max(number, pairs):.1e}, which is too many: {MEND}."
        )
    ranges = [np.arange(-n, n + 1) for n in to_each_side]
    shifts = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
    copies = (positions[None] + (shifts @ cell)[:, None]).reshape(-1, 3)
    low, high = positions.min(axis=0) - reach, positions.max(axis=0) + reach
    near = np.flatnonzero(((copies >= low) & (copies <= high)).all(axis=1))
    tree = cKDTree(copies[near])
    found = cKDTree(positions).sparse_distance_matrix(
        tree, reach + _ROUNDING, output_type="ndarray"
    )
    target, copy = found["i"].astype(np.int64), near[found["j"]]
    source, offsets = copy % len(positions), shifts[copy // len(positions)]
    other = (source != target) | offsets.any(axis=1)
    target, source, offsets = target[other], source[other], offsets[other]
    order = np.lexsort((*offsets.T[::-1], source, target))
    return np.stack([source, target])[:, order], offsets[order]
