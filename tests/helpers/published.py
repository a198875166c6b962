"""Files as they are published, small; the samples made of them; what is refused."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.datasets import LmdbDataset
from models import structures

from fairchem_kd.commands.main import main

FREE_ATOMS = {"H": -13.6, "C": -1028.5, "O": -2041.3}  # eV; any numbers do


def with_labels(atoms: ase.Atoms, calculator: EMT) -> ase.Atoms:
    """``atoms`` with energy and forces as numbers, which files can hold."""
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    atoms.info.clear()  # what ase.build knows of a surface is nothing that xyz can hold
    return atoms


def molecules(
    count: int, seed: int, names: tuple[str, ...] = ("H2O", "CH4", "CO2", "C2H6")
) -> list[ase.Atoms]:
    """Rattled molecules with EMT labels, far from the origin and without a cell."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        atoms = molecule(names[index % len(names)])
        atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape) + 100.0
        found.append(with_labels(atoms, EMT()))
    return found


def coll_text(frames: list[ase.Atoms]) -> str:
    """As COLL is published: species, positions, forces; total and atomization energy at the end."""
    text = ""
    for atoms in frames:
        relative = atoms.get_potential_energy()
        total = relative + sum(FREE_ATOMS[s] for s in atoms.symbols)
        text += f"{len(atoms)}\nProperties=species:S:1:pos:R:3:forces:R:3 "
        text += f'pbc="F F F" energy={total:.10f} atomization_energy={relative:.10f}\n'
        for symbol, x, f in zip(atoms.symbols, atoms.positions, atoms.get_forces(), strict=True):
            text += f"{symbol:2} " + " ".join(f"{v:16.8f}" for v in (*x, *f)) + "\n"
    return text


def write_oc20(folder: Path, number: int, systems: list[tuple[int, int]], seed: int) -> list[Any]:
    """A pair as OC20 is published; ``systems`` are (random id, frames). Returns what is in it."""
    folder.mkdir(exist_ok=True)
    text, log, held = "", "", []
    for system, frames in systems:
        for frame in range(frames):
            atoms = structures(4, seed=seed + frame, std=0.1)[system % 4]
            energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
            free = np.ones(len(atoms), dtype=int)
            free[atoms.constraints[0].index] = 0
            cell = " ".join(f"{v:.8f}" for v in np.array(atoms.cell).ravel())
            text += f'{len(atoms)}\nLattice="{cell}" Properties=species:S:1:pos:R:3:move_mask:L:1:'
            text += (
                f'tags:I:1:forces:R:3 energy={energy:.8f} free_energy={energy:.8f} pbc="T T T"\n'
            )
            for i, atom in enumerate(atoms):
                row = " ".join(f"{v:.8f}" for v in atom.position)
                labels = " ".join(f"{v:.8f}" for v in forces[i])
                text += f"{atom.symbol} {row} {'FT'[free[i]]} {atom.tag} {labels}\n"
            reference = 10.0 + system
            log += f"random{system},frame{frame * 3},{reference}\n"
            held.append((system, frame * 3, energy - reference, atoms, forces, 1 - free))
    (folder / f"{number}.extxyz.xz").write_bytes(lzma.compress(text.encode()))
    (folder / f"{number}.txt").write_text(log)
    return held


def read(folder: Path) -> list[Any]:
    dataset = LmdbDataset({"src": str(folder)})
    found = [dataset[index] for index in range(len(dataset))]
    natoms = np.load(folder / "metadata.npz")["natoms"]
    assert natoms.tolist() == [sample.natoms for sample in found]
    return found


@pytest.fixture(scope="module")
def coll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of COLL's three files."""
    root = tmp_path_factory.mktemp("coll")
    for seed, (split, count) in enumerate((("train", 12), ("val", 5), ("test", 4))):
        text = coll_text(molecules(count, seed))
        (root / f"coll_v1.2_AE_{split}.xyz").write_text(text)
    return root


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: object) -> str:
    """What the command says; nothing but a hidden folder may be left."""
    dest = tmp_path / "refused"
    assert main(["data", "convert", *map(str, argv), str(dest), "--processes", "1"]) == 2
    assert not dest.exists()
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert "Traceback" not in error
    return sentences[0]
