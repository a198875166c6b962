"""What a recipe hands to the writer: labelled frames, grouped by trajectory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Frame:
    """One labelled structure of N atoms.

    ``pos`` and ``cell`` are already rounded to float32 and the labels belong to the rounded
    values, so that a recalculation from the stored structure gives the stored labels.
    """

    numbers: NDArray[np.int64]  #: atomic numbers, ``(N,)``
    pos: NDArray[np.float32]  #: Å, ``(N, 3)``
    cell: NDArray[np.float32]  #: Å, ``(3, 3)``
    tags: NDArray[np.int32]  #: 0 sub-surface, 1 surface, 2 adsorbate or molecule, ``(N,)``
    fixed: NDArray[np.int32]  #: 1 where the atom may not move, ``(N,)``
    energy: float  #: eV, as the method gives it (references not yet subtracted)
    forces: NDArray[np.float32]  #: eV/Å, constraints not applied, ``(N, 3)``


@dataclass
class Trajectory:
    """The frames that one seed gives, and why others were left out."""

    info: dict[str, str]  #: what the trajectory is of; the same keys throughout a recipe
    frames: list[Frame] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def too_close(distances: Array, radii: Array, factor: float) -> bool:
    """Whether any pair of a ``(N, N)`` distance matrix is nearer than its radii allow.

    Args:
        distances: Å, ``(N, N)``.
        radii: covalent radii in Å, ``(N,)``.
        factor: the share of the sum of the two radii that counts as too close.
    """
    limit = factor * (radii[:, None] + radii[None, :])
    np.fill_diagonal(limit, 0.0)
    return bool((distances < limit).any())
