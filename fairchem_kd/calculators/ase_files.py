"""Structures of files that ASE reads, as a store knows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
import numpy as np
from ase.geometry import wrap_positions
from ase.io import iread

from fairchem_kd.calculators.filling import Item
from fairchem_kd.errors import UserError
from fairchem_kd.stock.periodicity import as_periodic, tags_of
from fairchem_kd.store.format import Structure


def structure_of(atoms: ase.Atoms) -> Structure:
    """The structure that fairchem's models would see of these atoms."""
    made = as_periodic(atoms)
    tags = np.asarray(made.get_tags())
    if not tags.any():
        tags = tags_of(len(atoms), bool(np.any(atoms.pbc)))
    cell = np.array(made.cell)
    # as fairchem's AtomsToGraphs does
    pos = wrap_positions(made.get_positions(), cell, pbc=made.pbc, eps=0)
    return Structure(
        made.numbers,
        np.asarray(pos, "<f4"),
        np.asarray(cell, "<f4"),
        np.ones(3, dtype=bool),
        tags,
    )


class AseFiles:
    """The structures of several files, one after the other.

    Raises:
        UserError: a file is not there.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        for path in self.paths:
            if not path.is_file():
                raise UserError(f"{path} is no file: name files that ASE reads.")

    def __len__(self) -> int:
        return sum(1 for _ in self._atoms())

    def items(self, part: int = 0, parts: int = 1) -> Iterator[Item]:
        """Every ``parts``-th structure from ``part`` on.

        Raises:
            UserError: a file that ASE cannot read.
        """
        for place, (path, number, atoms) in enumerate(self._atoms()):
            if place % parts == part:
                yield Item(str(path), number, structure_of(atoms))

    def _atoms(self) -> Iterator[tuple[Path, int, ase.Atoms]]:
        for path in self.paths:
            try:
                for number, atoms in enumerate(iread(path, index=":")):
                    yield path, number, atoms
            except Exception as error:  # each of ASE's many readers fails in its own way
                raise UserError(
                    f"{path} cannot be read by ASE ({type(error).__name__}: {error}); name a "
                    "file in a format of ase.io, or one of `fairchem-kd teach --structures`."
                ) from error
