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
from torch import Tensor

from fairchem_kd.stock.pairs import SAME_ATOM, neighbours


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
            kept = ((squares <= cutoff * cutoff) & (squares > SAME_ATOM)).nonzero().squeeze(1)
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
        strain = data.get("strain")  # of images too, where the slope with it is asked for
        if strain is not None:
            offsets = offsets + (offsets[:, None] @ strain[reach.system[kept]]).squeeze(1)
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
        edges, shifts = neighbours(where, cells[system], pbc[system], reach)
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
