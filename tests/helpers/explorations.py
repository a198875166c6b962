"""Structures to begin with and potentials that are quickly asked, for tests of explorations."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase
import lmdb
import numpy as np
import torch
from torch_geometric.data import Data

from fairchem_kd.explore.potentials import Answer
from fairchem_kd.explore.starts import Source, Start, start_of


def start(atoms: ase.Atoms, *, fixed: Sequence[int] = (), place: int = 0) -> Start:
    """These atoms, some of them fixed, as a structure of the split train."""
    held = torch.zeros(len(atoms))
    held[list(fixed)] = 1
    sample = Data(
        pos=torch.tensor(atoms.positions, dtype=torch.float32),
        cell=torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(atoms.numbers),
        pbc=torch.tensor(atoms.pbc)[None],
        fixed=held,
        sid=place,
    )
    return start_of(sample, Source(Path("here"), "train"), place)


#: Steps so long that frames differ by more than what counts as alike.
FAST = ["--time-step", "5", "--temperature", "1500"]


def samples(split: str) -> list[Any]:
    """The samples of a split, in order."""
    environment = lmdb.open(f"{split}/data.0000.lmdb", subdir=False, readonly=True, lock=False)
    with environment.begin() as transaction:
        count = pickle.loads(transaction.get(b"length"))
        found = [pickle.loads(transaction.get(str(n).encode())) for n in range(count)]
    environment.close()
    return found


class Wells:
    """Each atom in a harmonic well about where it was first asked about.

    Args:
        stiffness: eV/Å².
        silent: call after which it says nothing.
        factor: of its forces.
    """

    name, batch = "wells", 4

    def __init__(
        self, centres: dict[int, np.ndarray], stiffness: float = 5.0, factor: float = 1.0
    ) -> None:
        self.centres, self.stiffness, self.factor = centres, stiffness, factor
        self.asked: list[int] = []  #: structures of each call

    def __call__(self, structures: Sequence[ase.Atoms]) -> list[Answer | None]:
        self.asked.append(len(structures))
        return [self.answer(atoms) for atoms in structures]

    def answer(self, atoms: ase.Atoms) -> Answer | None:
        """Structures are told apart by how many atoms they have."""
        away = atoms.positions - self.centres[len(atoms)]
        energy = 0.5 * self.stiffness * float((away**2).sum())
        return Answer(energy, -self.factor * self.stiffness * away)

    def check_elements(self, numbers: Any) -> None:
        pass


def wells(*starts: Start, **options: float) -> Wells:
    """Wells about where these are."""
    return Wells({len(one.numbers): one.pos.copy() for one in starts}, **options)
