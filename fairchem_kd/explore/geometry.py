"""Distances within a structure, and what does not change when it is turned, moved or renumbered."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.data import covalent_radii
from numpy.typing import NDArray

from fairchem_kd.stock.periodicity import completed

Array = NDArray[np.float64]

#: Å up to which the nearest image has to be the nearest indeed: further apart is far, however far.
_EXACT = 6.0
_FINENESS = 24  # points at which distances of one pair of elements are compared


def pair_distances(pos: Array, cell: Array, pbc: NDArray[np.bool_]) -> Array:
    """Å, ``(N, N)``, to the nearest image; infinite on the diagonal.

    Rounding fractional coordinates finds it in a cell with right angles, and in any other one below
    half of its smallest height; where that is not enough, ASE looks at all neighbouring images.
    """
    vectors = pos[:, None] - pos[None, :]
    if pbc.any() and abs(np.linalg.det(cell)) <= 1e-6:
        cell = completed(cell)  # an edge that is missing is one along which nothing repeats
    if pbc.any() and abs(np.linalg.det(cell)) > 1e-6:
        if _rounding_finds(cell):
            shifts = np.round(vectors @ np.linalg.inv(cell)) * pbc
            vectors = vectors - shifts @ cell
        else:
            from ase.geometry import find_mic

            vectors = find_mic(vectors.reshape(-1, 3), cell, pbc)[0].reshape(vectors.shape)
    distances = np.sqrt(np.einsum("ijk,ijk->ij", vectors, vectors))
    np.fill_diagonal(distances, np.inf)
    return distances


def _rounding_finds(cell: Array) -> bool:
    products = cell @ cell.T
    if np.abs(products - np.diag(np.diag(products))).max() < 1e-6 * np.trace(products):
        return True
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    return bool(heights.min() / 2 > _EXACT)


def gap(distances: Array) -> float:
    """Å: the least reach with which all atoms are connected; 0 of a single atom.

    It is the longest edge of the shortest tree (Prim): the distance of what is farthest from all
    else, an adsorbate from its slab or a fragment from the rest.
    """
    count = len(distances)
    nearest = distances[0].copy() if count else np.zeros(0)
    reached = np.zeros(count, dtype=bool)
    reached[:1] = True
    longest = 0.0
    for _ in range(count - 1):
        nearest[reached] = np.inf
        next_one = int(nearest.argmin())
        longest = max(longest, float(nearest[next_one]))
        reached[next_one] = True
        nearest = np.minimum(nearest, distances[next_one])
    return longest


def contacts(numbers: NDArray[Any]) -> Array:
    """Å, ``(N, N)``: the sums of two covalent radii."""
    radii = covalent_radii[np.asarray(numbers, dtype=int)]
    return radii[:, None] + radii[None, :]


def fingerprint(numbers: NDArray[Any], distances: Array) -> Array:
    """What is the same of two structures that are the same but for rotation, order and so on.

    For each pair of elements the distances between such atoms, in order, read at `_FINENESS` places
    (their quantiles). The root mean square difference of two such rows is, as nearly as so many
    places tell, the Wasserstein distance (of order 2) of the two sets of distances, in Å.

    Args:
        numbers: atomic numbers, ``(N,)``.
        distances: of :func:`pair_distances`.

    Returns:
        ``(P, _FINENESS)`` in Å, P pairs of elements in order; P is 0 of a single atom.
    """
    numbers = np.asarray(numbers, dtype=int)
    elements = np.unique(numbers)
    places = (np.arange(_FINENESS) + 0.5) / _FINENESS
    rows = []
    for one, first in enumerate(elements):
        for other in elements[one:]:
            block = distances[np.ix_(numbers == first, numbers == other)]
            values = block[np.triu_indices(len(block), 1)] if first == other else block.ravel()
            if values.size:
                rows.append(np.quantile(values, places))
    return np.stack(rows) if rows else np.zeros((0, _FINENESS))
