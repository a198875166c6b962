"""The stress of a conservative student: finite differences, symmetries, who asks, who has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io.trajectory import Trajectory
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from models import fit_scales, structures
from trainings import config, trainer
from trainings import data as data

from fairchem_kd.md import StudentCalculator

FLAVOURS = ("painn_energy", "schnet_energy", "gemnet_oc_energy")
TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Untrained students with normalisers, and one with direct forces."""
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for flavour in (*FLAVOURS, "painn"):
        arguments = config(root, data, model=flavour)
        arguments["task"]["conservative"] = flavour != "painn"
        with trainer(arguments, identifier=flavour) as built:
            fit_scales(built.model)
            found[flavour] = Path(built.save(checkpoint_file=f"{flavour}.pt", training_state=False))
    return found


@pytest.fixture(scope="module")
def student(checkpoints: dict[str, Path]) -> StudentCalculator:
    return StudentCalculator(checkpoints["painn_energy"], device="cpu")


def cell(number: int = 0) -> Atoms:
    """A slab squeezed and skewed, so that there is no symmetry and the stress is large."""
    atoms = structures(number + 1)[number]
    atoms.set_constraint()
    atoms.calc = None
    atoms.set_cell(
        atoms.cell.array @ np.array([[0.95, 0, 0], [0.05, 0.97, 0], [0.02, -0.03, 0.9]]),
        scale_atoms=True,
    )
    return atoms


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return other


def energy(calculator: Any, atoms: Atoms) -> float:
    atoms.calc = calculator
    return float(atoms.get_potential_energy())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_it_is_the_slope_of_the_energy_with_strain(
    checkpoints: dict[str, Path], flavour: str
) -> None:
    calculator, atoms, step = StudentCalculator(checkpoints[flavour], device="cpu"), cell(), 4e-3
    atoms.calc = calculator
    found = atoms.get_stress(voigt=False) * atoms.get_volume()  # eV
    expected = np.zeros((3, 3))
    for i in range(3):
        for j in range(i, 3):
            strain = np.zeros((3, 3))
            strain[i, j] += step / 2
            strain[j, i] += step / 2
            ends = [energy(calculator, strained(atoms, sign * strain)) for sign in (1, -1)]
            expected[i, j] = expected[j, i] = (ends[0] - ends[1]) / (2 * step)
    size = np.abs(expected).max()
    assert size > 1e-2
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.02 * size  # shear is tested too
    np.testing.assert_allclose(found, expected, atol=0.01 * size + 5e-4)  # energies in float32


def test_it_turns_with_the_structure(student: StudentCalculator) -> None:
    atoms = cell()
    (one,) = student.calculate_batch([atoms], stress=True)
    for matrix in (TURN, -TURN):
        other = atoms.copy()
        other.set_cell(atoms.cell.array @ matrix.T)
        other.positions = atoms.positions @ matrix.T + 0.3
        (two,) = student.calculate_batch([other], stress=True)
        turned = matrix @ voigt_6_to_full_3x3_stress(one["stress"]) @ matrix.T
        np.testing.assert_allclose(
            two["stress"], full_3x3_to_voigt_6_stress(turned), rtol=1e-3, atol=1e-7
        )


def test_a_supercell_has_the_same(student: StudentCalculator) -> None:
    one, many = student.calculate_batch([cell(), cell().repeat((2, 1, 1))], stress=True)
    np.testing.assert_allclose(many["stress"], one["stress"], rtol=1e-3, atol=1e-7)


def test_in_a_batch_it_is_as_alone_and_nothing_else_changes(student: StudentCalculator) -> None:
    made = [cell(0), cell(1), cell(2)]
    found = student.calculate_batch(made, stress=True)
    searches = student.searches
    without = student.calculate_batch(made)
    assert student.searches == searches
    for atoms, one, plain in zip(made, found, without, strict=True):
        (alone,) = student.calculate_batch([atoms], stress=True)
        np.testing.assert_allclose(one["stress"], alone["stress"], rtol=1e-4, atol=1e-8)
        assert "stress" not in plain
        np.testing.assert_allclose(one["forces"], plain["forces"], atol=3e-5)
        assert one["energy"] == pytest.approx(plain["energy"], abs=3e-5)


def test_ase_has_it_where_it_asks(checkpoints: dict[str, Path]) -> None:
    student, atoms = StudentCalculator(checkpoints["painn_energy"], device="cpu"), cell()
    atoms.calc = student
    atoms.get_forces()
    assert "stress" not in student.results  # nobody has asked
    stress = atoms.get_stress()
    (expected,) = StudentCalculator(checkpoints["painn_energy"], device="cpu").calculate_batch(
        [atoms], stress=True
    )
    np.testing.assert_allclose(stress, expected["stress"], rtol=1e-4, atol=1e-8)
    atoms.positions[0] += 0.05
    atoms.get_forces()
    assert "stress" in student.results  # by the same forward, since someone asks at every step
    assert not np.allclose(student.results["stress"], stress)
    atoms.set_cell(atoms.cell * 1.02, scale_atoms=True)
    assert not np.allclose(atoms.get_stress(), student_of(checkpoints, atoms, 1 / 1.02))


def student_of(checkpoints: dict[str, Path], atoms: Atoms, scale: float) -> np.ndarray:
    other = atoms.copy()
    other.set_cell(atoms.cell * scale, scale_atoms=True)
    other.calc = StudentCalculator(checkpoints["painn_energy"], device="cpu")
    return other.get_stress()


def test_a_cell_is_relaxed(student: StudentCalculator) -> None:
    from ase.filters import FrechetCellFilter
    from ase.optimize import LBFGS

    atoms = cell()
    atoms.calc = student
    before, pressed = atoms.get_potential_energy(), np.abs(atoms.get_stress()).max()
    with LBFGS(FrechetCellFilter(atoms), logfile=None) as optimiser:  # type: ignore[no-untyped-call]
        optimiser.run(fmax=0.0, steps=8)
    assert atoms.get_potential_energy() < before
    assert np.abs(atoms.get_stress()).max() < pressed


def test_a_trajectory_does_not_ask_for_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """ASE looks for every property when it writes a frame."""
    student, atoms = StudentCalculator(checkpoints["painn_energy"], device="cpu"), cell()
    atoms.calc = student
    with Trajectory(tmp_path / "md.traj", "w", atoms) as trajectory:
        for _ in range(2):
            atoms.rattle(0.01, seed=0)
            atoms.get_forces()
            trajectory.write()
    assert "stress" not in student.results
    atoms.get_stress()
    atoms.rattle(0.01, seed=0)
    atoms.get_forces()
    assert "stress" in student.results


@pytest.mark.parametrize("pbc", [False, (True, True, False)])
def test_without_periodicity_there_is_none(student: StudentCalculator, pbc: Any) -> None:
    atoms = molecule("CH3OH") if pbc is False else structures(1)[0]
    atoms.pbc = pbc
    atoms.calc = student
    atoms.get_forces()
    with pytest.raises(PropertyNotImplementedError, match="periodic along all axes, and have"):
        atoms.get_stress()
    with pytest.raises(PropertyNotImplementedError, match="periodic along all axes, and have"):
        student.calculate_batch([cell(), atoms], stress=True)
    assert np.isfinite(atoms.get_forces()).all()


def test_direct_forces_have_none(checkpoints: dict[str, Path]) -> None:
    student, atoms = StudentCalculator(checkpoints["painn"], device="cpu"), cell()
    assert "stress" not in student.implemented_properties
    atoms.calc = student
    for ask in (atoms.get_stress, lambda: student.calculate_batch([atoms], stress=True)):
        with pytest.raises(PropertyNotImplementedError, match=r"painn\.pt has no stress"):
            ask()
