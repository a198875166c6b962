"""Normalised and physical energies and forces, against loops over systems and atoms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairchem.core.modules.normalization.element_references import LinearReferences
from fairchem.core.modules.normalization.normalizer import Normalizer

from fairchem_kd.models.units import Units

NATOMS = [2, 3, 1]
NUMBERS = [1, 8, 29, 29, 6, 1]
MEAN, RMSD, FORCE_RMSD = -0.75, 2.9, 1.3
REFERENCES = {1: 0.3, 6: -1.0, 8: 2.5, 29: -3.1}


@pytest.fixture
def batch() -> SimpleNamespace:
    natoms = torch.tensor(NATOMS)
    return SimpleNamespace(
        natoms=natoms,
        atomic_numbers=torch.tensor(NUMBERS, dtype=torch.float32),
        batch=torch.repeat_interleave(torch.arange(3), natoms),
    )


@pytest.fixture
def units() -> Units:
    table = torch.zeros(119, dtype=torch.float64)
    for number, value in REFERENCES.items():
        table[number] = value
    normalizers = {
        "energy": Normalizer(torch.tensor(MEAN).double(), torch.tensor(RMSD).double()),
        "forces": Normalizer(torch.tensor(0.0).double(), torch.tensor(FORCE_RMSD).double()),
    }
    return Units(normalizers, {"energy": LinearReferences(table)})


def test_energies_and_forces(units: Units, batch: SimpleNamespace) -> None:
    energies = torch.tensor([[0.1], [-2.0], [3.0]], dtype=torch.float64)
    physical = units.physical("energy", energies, batch)
    start = 0
    for system, natoms in enumerate(NATOMS):
        expected = energies[system].item() * RMSD + MEAN
        expected += sum(REFERENCES[z] for z in NUMBERS[start : start + natoms])
        assert physical[system].item() == pytest.approx(expected, abs=1e-6)
        start += natoms
    torch.testing.assert_close(units.normalized("energy", physical, batch), energies)
    forces = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(units.physical("forces", forces, batch), forces * FORCE_RMSD)


def test_atom_energies_sum_to_the_energies(units: Units, batch: SimpleNamespace) -> None:
    atoms = torch.randn(6, 1, dtype=torch.float64)
    sums = torch.zeros(3, 1, dtype=torch.float64).index_add_(0, batch.batch, atoms)
    physical = units.physical_atom_energies(atoms, batch)
    totals = torch.zeros(3, 1, dtype=torch.float64).index_add_(0, batch.batch, physical)
    torch.testing.assert_close(totals, units.physical("energy", sums, batch))
    torch.testing.assert_close(units.normalized_atom_energies(physical, batch), atoms)
    # each atom carries its own element's reference
    expected = atoms[2].item() * RMSD + MEAN / 3 + REFERENCES[29]
    assert physical[2].item() == pytest.approx(expected, abs=1e-6)


def test_without_normalisers_nothing_changes(batch: SimpleNamespace) -> None:
    values = torch.randn(6, 1)
    units = Units({}, {})
    assert torch.equal(units.physical("energy", values, batch), values)
    assert torch.equal(units.physical_atom_energies(values, batch), values)
