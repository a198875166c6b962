"""The structures that a calculator is asked about, as the model takes them, from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.geometry import wrap_positions
from numpy.typing import NDArray

from fairchem_kd.stock.constraints import held
from fairchem_kd.stock.datasets import collate
from fairchem_kd.stock.periodicity import axes, everywhere

if TYPE_CHECKING:
    from ase import Atoms
    from torch_geometric.data import Batch

Array = NDArray[Any]

FAR = 100.0  #: Å, where float32 rounds by up to 4e-6 Å


class Systems:
    """A batch of structures whose atoms move while all else stays.

    Args:
        structures: of any periodicity; those of one batch are made alike where they differ.
        device: of the model.

    Raises:
        ValueError: the vectors of a cell lie in a plane.
    """

    def __init__(self, structures: Sequence[Atoms], device: torch.device) -> None:
        self.numbers = [atoms.numbers.copy() for atoms in structures]
        self.cells = [np.array(atoms.cell) for atoms in structures]
        self.pbc = [atoms.pbc.copy() for atoms in structures]
        self.tags = [atoms.get_tags() for atoms in structures]
        periodic = [axes(atoms.pbc, np.array(atoms.cell)) for atoms in structures]
        alike = all(np.array_equal(one, periodic[0]) for one in periodic)
        samples, shifts = [], []
        for atoms, own in zip(structures, periodic, strict=True):
            cell, pbc = _cell_and_pbc(atoms, own, alike)
            wrapped = wrap_positions(_near(atoms.positions, own), cell, pbc=pbc, eps=0)
            shifts.append(wrapped - atoms.positions)
            samples.append(_sample(atoms, wrapped, cell, pbc))
        self.batch: Batch = collate(samples).to(device)
        self._shift = np.concatenate(shifts)
        self._start = _positions(structures)

    def are(self, structures: Sequence[Atoms]) -> bool:
        """Whether these are the same but for where their atoms are."""
        return len(structures) == len(self.numbers) and all(
            np.array_equal(atoms.numbers, numbers)
            and np.array_equal(atoms.cell.array, cell)
            and np.array_equal(atoms.pbc, pbc)
            and np.array_equal(atoms.arrays.get("tags", 0 * numbers), tags)
            for atoms, numbers, cell, pbc, tags in zip(
                structures, self.numbers, self.cells, self.pbc, self.tags, strict=True
            )
        )

    def move_to(self, structures: Sequence[Atoms]) -> float:
        """Put the atoms where they are now; how far the farthest is from where it began, in Å."""
        positions = _positions(structures)
        moved = positions - self._start
        pos = torch.from_numpy((positions + self._shift).astype(np.float32))
        self.batch.pos = pos.to(self.batch.natoms.device)
        return float(np.sqrt(np.einsum("ij,ij->i", moved, moved).max()))


def _positions(structures: Sequence[Atoms]) -> Array:
    """Å, ``(N, 3)``, of all of them."""
    if len(structures) == 1:
        return structures[0].positions.copy()
    return np.concatenate([atoms.positions for atoms in structures])


def _cell_and_pbc(atoms: Atoms, periodic: Array, alike: bool) -> tuple[Array, Array]:
    """As stock's calculator has them; of structures that differ, periodic along all axes.

    Along an axis without an edge nothing is periodic, whatever ``atoms.pbc`` says: stock takes the
    1 Å for an edge by which ASE completes a cell.
    """
    if alike:
        return np.array(atoms.get_cell(complete=True)), periodic
    cell = everywhere(np.array(atoms.cell), periodic, atoms.positions)
    return cell, np.ones(3, dtype=bool)


def _near(positions: Array, periodic: Array) -> Array:
    """Å, ``(N, 3)``: moved to the origin where float32, which models take, would round them."""
    if periodic.all() or np.abs(positions).max() < FAR:
        return positions
    return positions - positions.mean(axis=0)


def _sample(atoms: Atoms, positions: Array, cell: Array, pbc: Array) -> Any:
    from torch_geometric.data import Data

    return Data(
        pos=torch.from_numpy(positions).float(),
        cell=torch.from_numpy(cell).view(1, 3, 3).float(),
        pbc=torch.from_numpy(pbc).view(1, 3),
        atomic_numbers=torch.from_numpy(atoms.numbers.astype(np.uint8)),
        natoms=len(atoms),
        tags=torch.from_numpy(atoms.get_tags().astype(np.int32)),
        fixed=torch.from_numpy(held(atoms)[0]),
        sid=0,
        fid=0,
    )
