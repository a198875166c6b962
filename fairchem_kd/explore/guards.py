"""Which structures nobody should learn from: atoms that overlap, fragments that fly off, ..."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fairchem_kd.explore.geometry import Array, contacts, gap, pair_distances
from fairchem_kd.explore.starts import Start

#: Why a structure was not taken, as counts of an exploration tell it.
CLOSE = "atoms too close"
APART = "an atom or a fragment flew away"
STRONG = "a force too large"
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Limits:
    """What a structure may be.

    ``min_distance``: of the sum of two covalent radii, the least distance of two atoms;
    ``max_gap``: Å, the largest distance of a fragment from all else; ``max_force``: eV/Å, the
    largest force on an atom.
    """

    min_distance: float = 0.55
    max_gap: float = 5.0
    max_force: float = 50.0


class Guard:
    """The limits for what becomes of one structure.

    What that has itself, closer atoms or a wider gap, is no fault of what comes of it.

    Args:
        start: where it begins.
        limits: for all structures.
    """

    def __init__(self, start: Start, limits: Limits) -> None:
        self.start = start
        self.limits = limits
        before = self._distances(start.pos)
        self._nearest = np.minimum(limits.min_distance * contacts(start.numbers), before * 0.999)
        self._gap = max(limits.max_gap, 1.001 * gap(before))

    def broken_by(self, pos: Array, forces: Array | None = None, *, whole: bool = True) -> str:
        """Why it is not to be taken; empty where it may be.

        Args:
            pos: Å, ``(N, 3)``.
            forces: eV/Å, ``(N, 3)``, where they are known.
            whole: look at gaps too, which takes longest.
        """
        if not np.isfinite(pos).all() or (forces is not None and not np.isfinite(forces).all()):
            return NOT_FINITE
        if forces is not None and _largest(forces) > self.limits.max_force:
            return STRONG
        distances = self._distances(pos)
        if (distances < self._nearest).any():
            return CLOSE
        return APART if whole and gap(distances) > self._gap else ""

    def _distances(self, pos: Array) -> Array:
        return pair_distances(pos, self.start.cell, self.start.pbc)


def _largest(forces: Array) -> float:
    """eV/Å: of the force on an atom."""
    return float(np.linalg.norm(forces, axis=1).max(initial=0.0))
