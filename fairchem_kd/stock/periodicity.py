"""Which structures stock's models make the right graphs of, and how the others become such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import ase

#: Å of room that a structure gets along an axis that is not periodic: more than any model looks.
ROOM = 40.0
COMPLETED = 1.001  #: Å: an edge that is no longer than that may have been put in by ASE
FLAT = 1e-3  #: of a cell with edges of length 1: the volume below which it has none


def tags_of(atoms: int, periodic: bool) -> NDArray[np.int64]:
    """Tags, ``(N,)``, of a structure whose atoms have none, or all 0, which is ASE's default.

    GemNet-OC's quadruplets are for tags 1 (surface) and 2 (adsorbate), so that not every atom may
    have 0: a molecule has 2, anything periodic 1.
    """
    return np.full(atoms, 1 if periodic else 2)


def room(cell: NDArray[Any], periodic: NDArray[Any], pos: NDArray[Any]) -> NDArray[np.float64]:
    """A cell with `ROOM` between a structure and its images along axes that are not periodic.

    Args:
        cell: Å, ``(3, 3)``.
        periodic: ``(3,)``.
        pos: Å, ``(N, 3)``; they stay where they are.
    """
    made = completed(cell)
    for axis in np.flatnonzero(~periodic):
        normal = np.cross(made[axis - 2], made[axis - 1])
        normal /= np.linalg.norm(normal)
        height = abs(made[axis] @ normal)
        needed = (np.ptp(pos @ normal) if len(pos) else 0.0) + ROOM
        made[axis] *= max(1.0, needed / height)
    return made


def everywhere(
    cell: NDArray[Any], pbc: NDArray[Any] | None, pos: NDArray[Any]
) -> NDArray[np.float64]:
    """The cell, Å, ``(3, 3)``, with which a structure is periodic along all axes, room included.

    Along axes that are periodic already it is as it was, so that doing it twice changes nothing.

    Raises:
        ValueError: the vectors along periodic axes and the others lie in a plane.
    """
    given = np.asarray(cell, dtype=np.float64)
    periodic = axes(pbc, given)
    if not periodic.any() and flat(given):
        given = np.zeros((3, 3))  # nobody looks at it
    if flat(given):
        raise ValueError("its cell's vectors lie in a plane")
    return room(given, periodic, np.asarray(pos, dtype=np.float64))


def as_periodic(atoms: ase.Atoms) -> ase.Atoms:
    """A copy that is periodic along all three axes, without images in reach along new ones.

    fairchem's models make their graphs with one ``pbc`` for a whole batch; along an axis that was
    not periodic, the cell becomes so long that room lies between a structure and its image.
    """
    copy = atoms.copy()
    if bool(np.all(copy.pbc)):
        return copy
    periodic = axes(np.asarray(copy.pbc), np.array(copy.cell))
    copy.set_cell(room(np.array(copy.cell), periodic, copy.positions))
    copy.center(axis=tuple(int(axis) for axis in np.flatnonzero(~periodic)))
    copy.pbc = True
    return copy


def flat(cell: NDArray[Any]) -> bool:
    """Whether its vectors, completed, lie in a plane, or nearly so."""
    whole = completed(cell)
    return bool(abs(np.linalg.det(whole)) <= FLAT * np.linalg.norm(whole, axis=1).prod())


def completed(cell: NDArray[Any]) -> NDArray[np.float64]:
    """The cell, Å, ``(3, 3)``, with unit vectors at right angles for those that it has not."""
    from ase.geometry.cell import complete_cell

    return np.array(complete_cell(np.asarray(cell, dtype=np.float64)))


def axes(pbc: NDArray[Any] | None, cell: NDArray[Any]) -> NDArray[np.bool_]:
    """Which axes, ``(3,)``, are periodic: those that are said to be, if the cell has an edge there.

    Where nobody says, all that have one. An edge of 1 Å is none then: ASE and fairchem complete
    cells with unit vectors, and no crystal has one so short.
    """
    lengths = np.linalg.norm(cell, axis=1)
    return lengths > COMPLETED if pbc is None else (lengths > 0) & np.asarray(pbc, dtype=bool)


def alike(pbcs: Sequence[NDArray[Any] | None], cells: Sequence[NDArray[Any]]) -> bool:
    """Whether stock makes the right graphs of all of them in one batch."""
    said = [pbc for pbc in pbcs if pbc is not None]
    if len(said) not in (0, len(pbcs)) or any(not np.array_equal(pbc, said[0]) for pbc in said):
        return False
    if said and not said[0].any():
        return True  # whatever the cells are, they are not looked at
    stacked = np.stack(cells)
    lengths = np.linalg.norm(stacked, axis=2)
    shortest = 0.0 if said else COMPLETED
    volumes = np.abs(np.linalg.det(stacked))
    return bool((lengths > shortest).all() and (volumes > FLAT * lengths.prod(axis=1)).all())
