"""Which structures are there already: by distances within them, whatever their place and order."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairchem_kd.explore.geometry import Array, fingerprint, pair_distances

_CELL_DIGITS = 3  # Å: cells that agree so far are the same


class Known:
    """Structures that were seen, and whether another one is as good as one of them.

    Two structures of the same atoms are the same where, for every pair of elements, the distances
    between such atoms differ by less than ``alike`` (root mean square, Å); see
    :func:`~fairchem_kd.explore.geometry.fingerprint`. What is left out of that is small: whether a
    structure is the mirror image of another one, which changes neither energy nor forces.

    Args:
        alike: Å; 0: no two structures are the same.
    """

    def __init__(self, alike: float) -> None:
        self.alike = alike
        self._rows: dict[Any, list[Array]] = defaultdict(list)

    def has(self, numbers: NDArray[Any], pos: Array, cell: Array, pbc: NDArray[np.bool_]) -> bool:
        """Whether a structure is as good as one that was noted.

        Args:
            numbers: atomic numbers, ``(N,)``.
            pos: Å, ``(N, 3)``.
            cell: Å, ``(3, 3)``.
            pbc: ``(3,)``.
        """
        if self.alike <= 0:
            return False
        row, kind = self._row(numbers, pos, cell, pbc)
        # Means differ by no more than the largest difference of a pair of elements does, so that
        # those to compare with are in its bin or beside it.
        for beside in (-1, 0, 1):
            others = self._rows.get((kind, self._bin(row) + beside))
            if others and self._closest(row, np.stack(others)) < self.alike:
                return True
        return False

    def add(self, numbers: NDArray[Any], pos: Array, cell: Array, pbc: NDArray[np.bool_]) -> None:
        """Note a structure; arguments as of :meth:`has`."""
        if self.alike > 0:
            row, kind = self._row(numbers, pos, cell, pbc)
            self._rows[kind, self._bin(row)].append(row)

    def _bin(self, row: Array) -> int:
        return int(np.floor(row.mean() / self.alike)) if row.size else 0

    @staticmethod
    def _row(
        numbers: NDArray[Any], pos: Array, cell: Array, pbc: NDArray[np.bool_]
    ) -> tuple[Array, Any]:
        """What is compared, and which structures can be compared at all: same atoms and cell."""
        shape = cell.round(_CELL_DIGITS) + 0.0 if pbc.any() else np.zeros((3, 3))
        kind = (np.sort(numbers).astype(int).tobytes(), shape.tobytes(), pbc.tobytes())
        return fingerprint(numbers, pair_distances(pos, cell, pbc)), kind

    @staticmethod
    def _closest(row: Array, others: Array) -> float:
        """Å: of the largest difference of a pair of elements, the least over ``others``."""
        if not row.size:
            return 0.0
        return float(np.sqrt(np.square(others - row).mean(axis=2)).max(axis=1).min())
