"""Which atoms are held: one rule for every way in which structures come here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import NDArray


def held(atoms: Atoms) -> tuple[NDArray[np.int32], bool]:
    """``fixed`` ``(N,)`` of a data set, and whether there are constraints that it cannot tell.

    Fixed is an atom that is held in all three directions: none of a force on it is left. One that
    is free in some direction, or tied to others, is free in a data set.
    """
    from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled

    # those that act on each atom by itself; whether it can move follows from them alone
    of_one_atom = (FixAtoms, FixCartesian, FixScaled, FixedPlane, FixedLine)
    alone = [one for one in atoms.constraints if isinstance(one, of_one_atom)]
    fixed = np.full(len(atoms), bool(alone))
    touched = np.zeros(len(atoms), dtype=bool)
    for direction in np.eye(3) if alone else ():
        forces = np.tile(direction, (len(atoms), 1))
        for constraint in alone:
            constraint.adjust_forces(atoms, forces)
        fixed &= np.abs(forces).max(axis=1, initial=0.0) < 1e-9
        touched |= np.abs(forces - direction).max(axis=1, initial=0.0) > 1e-9
    partly = bool((touched & ~fixed).any()) or len(alone) < len(atoms.constraints)
    return fixed.astype(np.int32), partly


def use_our_rule() -> None:
    """Have stock's ASE data sets take :func:`held` from here on, in this process and its workers.

    Stock knows ``FixAtoms`` alone, so that an atom that ``FixCartesian``, say, holds in all three
    directions counts as free when ``ase_read`` or ``ase_db`` reads it, and as fixed elsewhere.
    """
    import torch
    from fairchem.core.preprocessing import AtomsToGraphs

    stock = AtomsToGraphs.convert
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def convert(self: Any, atoms: Atoms, sid: Any = None) -> Any:
        data = stock(self, atoms, sid)
        if self.r_fixed:
            data.fixed = torch.from_numpy(held(atoms)[0]).to(data.fixed.dtype)
        return data

    AtomsToGraphs.convert = convert
