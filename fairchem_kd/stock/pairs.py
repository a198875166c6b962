"""The neighbours of a structure's atoms, found by a tree: numpy and scipy alone.

Stock compares every atom with every other in every image within reach; a tree finds the same edges
in time and memory that grow with the atoms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from fairchem_kd.errors import UserError

MEND = (
    "look at the cell (in Å) and leave such structures out, or take a smaller batch_size or "
    "model.cutoff"
)
_MOST = 2e8  # neighbours, or atoms and images of them, that are searched
_ROUNDING = 1e-4  # Å by which a search reaches further, for positions in float32
#: Å²: stock takes atoms nearer than that for one and the same.
SAME_ATOM = 1e-4


def repetitions(cells: NDArray[Any], pbc: NDArray[Any], cutoff: float) -> NDArray[np.float64]:
    """How many images of each cell are looked at to either side, ``(B, 3)``; 0 of a flat cell.

    Args:
        cells: Å, ``(B, 3, 3)``.
        pbc: ``(B, 3)``.
        cutoff: Å.
    """
    cells = np.asarray(cells, float).reshape(-1, 3, 3)
    areas = np.linalg.norm(np.cross(np.roll(cells, -1, 1), np.roll(cells, -2, 1)), axis=2)
    volumes = np.abs(np.linalg.det(cells))[:, None]
    with np.errstate(all="ignore"):
        found = np.ceil(cutoff * areas / volumes)
    return np.where(np.asarray(pbc, bool) & np.isfinite(found), found, 0.0)


def neighbours(
    positions: NDArray[Any], cell: NDArray[Any], pbc: NDArray[Any], reach: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
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
