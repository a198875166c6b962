"""StudentCalculator: stock's numbers along dynamics, in batches, and what goes wrong in words."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from fairchem.core.common.utils import radius_graph_pbc
from models import fit_scales, structures
from trainings import config, trainer
from trainings import data as data

import fairchem_kd
from fairchem_kd.analysis.physics.dynamics import run_dynamics
from fairchem_kd.analysis.physics.measure import check_forces
from fairchem_kd.analysis.subjects.calculators import make_calculator
from fairchem_kd.analysis.subjects.runs import read_model
from fairchem_kd.errors import UserError
from fairchem_kd.md import Exploded, StudentCalculator
from fairchem_kd.md.calculator import _tell_of_elements
from fairchem_kd.md.systems import Systems
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.stock.reused_graphs import _search

FLAVOURS = ("painn", "painn_energy", "schnet", "gemnet_oc")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Untrained models with normalisers; PaiNN for energies is conservative."""
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for flavour in FLAVOURS:
        arguments = config(root, data, model=flavour)
        arguments["task"]["conservative"] = flavour == "painn_energy"
        if flavour.startswith("painn"):
            arguments["model"]["max_neighbors"] = 20  # fewer than there are
        with trainer(arguments, identifier=flavour) as built:
            fit_scales(built.model)
            found[flavour] = Path(built.save(checkpoint_file=f"{flavour}.pt", training_state=False))
    return found


@pytest.fixture(scope="module")
def student(checkpoints: dict[str, Path]) -> StudentCalculator:
    return StudentCalculator(checkpoints["painn_energy"], device="cpu")


def answers(calculator: Any, atoms: Atoms) -> tuple[float, np.ndarray]:
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_numbers_are_stocks_along_a_walk(checkpoints: dict[str, Path], flavour: str) -> None:
    """Through the cell's faces, and out of the skin; with one edge more or less now and then."""
    stock = make_calculator(read_model(checkpoints[flavour]))
    ours = StudentCalculator(checkpoints[flavour], skin=0.8, device="cpu")
    chance, atoms = np.random.default_rng(1), structures(2)[1]
    atoms.positions -= atoms.positions[-1]  # an atom on a face, which steps over it
    steps = 12
    for _ in range(steps):
        atoms.positions += chance.normal(0, 0.06, atoms.positions.shape)
        energy, forces = answers(stock, atoms)
        found, pulls = answers(ours, atoms)
        assert found == pytest.approx(energy, abs=2e-5)
        np.testing.assert_allclose(pulls, forces, atol=3e-5)
    assert 1 < ours.searches < steps


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, False), (True, True, True)])
def test_any_periodicity(checkpoints: dict[str, Path], pbc: tuple[bool, ...]) -> None:
    atoms = molecule("CH3CH2OH") if not any(pbc) else structures(1)[0]
    atoms.pbc = pbc
    stock = make_calculator(read_model(checkpoints["painn"]))
    ours = StudentCalculator(checkpoints["painn"], device="cpu")
    energy, forces = answers(stock, atoms)
    found, pulls = answers(ours, atoms)
    assert found == pytest.approx(energy, abs=3e-5)
    np.testing.assert_allclose(pulls, forces, atol=3e-5)


def test_a_cell_smaller_than_the_cutoff(checkpoints: dict[str, Path]) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    energy, forces = answers(make_calculator(read_model(checkpoints["schnet"])), atoms)
    found, pulls = answers(StudentCalculator(checkpoints["schnet"], device="cpu"), atoms)
    assert found == pytest.approx(energy, abs=3e-5)
    np.testing.assert_allclose(pulls, forces, atol=3e-5)


def test_many_structures_at_once_are_as_each_alone(student: StudentCalculator) -> None:
    water = molecule("H2O")  # neither periodic nor with a cell, unlike the others
    many: list[Atoms] = [*structures(3), water]
    searches = student.searches
    for _ in range(2):
        for atoms in many:
            atoms.rattle(0.02, rng=np.random.default_rng(len(atoms)))
        found = student.calculate_batch(many)
    assert student.searches == searches + 1  # the second time they had moved a little
    for atoms, one in zip(many, found, strict=True):
        energy, forces = answers(student, atoms)
        assert one["energy"] == one["free_energy"] == pytest.approx(energy, abs=3e-5)
        np.testing.assert_allclose(one["forces"], forces, atol=3e-5)
    assert student.calculate_batch([]) == []


def test_results_are_of_the_structure_that_is_asked_about(student: StudentCalculator) -> None:
    atoms = structures(1)[0]
    first, _ = answers(student, atoms)
    assert student.calculation_required(atoms, ["energy"]) is False
    atoms.positions[3] += 0.05
    second, _ = answers(student, atoms)
    assert second != first
    atoms.numbers[3] = 78
    third, _ = answers(student, atoms)
    assert third != second
    atoms.set_cell(atoms.cell * 1.02)
    assert answers(student, atoms)[0] != third
    other = structures(2)[1]
    student.calculate_batch([other])
    atoms.set_cell(atoms.cell / 1.02)
    assert answers(student, atoms)[0] == pytest.approx(third, abs=3e-5)
    forces = atoms.get_forces()
    forces[:] = 0.0  # the caller's own
    assert np.abs(atoms.get_forces()).max() > 0


def test_forces_are_the_slope_and_nve_dynamics_keep_their_energy(
    checkpoints: dict[str, Path],
) -> None:
    student = StudentCalculator(checkpoints["painn_energy"], device="cpu")
    atoms = structures(1)[0]
    found = check_forces(student, atoms, step=0.005)
    np.testing.assert_allclose(found.forces, found.differences, atol=2e-3)
    atoms.set_constraint()
    spread = []
    for time_step in (0.5, 1.0):
        (run,) = run_dynamics(student, [atoms], steps=int(40 / time_step), time_step=time_step)
        assert run.stable, run.reason
        spread.append(run.fluctuation)
    assert spread[0] is not None
    assert spread[0] < 1e-3
    assert student.searches < 40


def test_what_explodes_says_so_and_leaves_its_trajectory(
    student: StudentCalculator, tmp_path: Path
) -> None:
    atoms = structures(1)[0]
    atoms.set_constraint()
    atoms.calc = student
    atoms.set_momenta(np.random.default_rng(0).normal(0, 1.0, (len(atoms), 3)))
    path = tmp_path / "md.traj"
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)

    def explode() -> None:
        if dynamics.get_number_of_steps() == 4:
            atoms.positions[2] = np.nan

    with Trajectory(path, "w", atoms) as trajectory:
        dynamics.attach(trajectory.write)
        dynamics.attach(explode)
        with pytest.raises(Exploded, match=r"not finite.*shorter time step"):
            dynamics.run(10)
    frames = read(path, ":")
    assert len(frames) == 5
    assert all(np.isfinite(frame.get_forces()).all() for frame in frames)
    # the calculator is as good as before
    assert np.isfinite(answers(student, structures(1)[0])[0])


def test_an_answer_that_is_not_finite(
    student: StudentCalculator, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs = structures(2)
    forward = student.model.forward

    def spoiled(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        out.raw["energy"][1] = torch.nan
        return out

    monkeypatch.setattr(student.model, "forward", spoiled)
    with pytest.raises(Exploded, match=r"for structure 1 \(.*\) is not finite"):
        student.calculate_batch(slabs)


def test_atoms_that_fly_apart(student: StudentCalculator) -> None:
    atoms = Atoms("OH", positions=[(0, 0, 0), (0, 0, 1)])
    assert np.isfinite(answers(student, atoms)[0])
    atoms.positions[1, 2] = 20.0
    with pytest.raises(Exploded, match=r"neighbour within 4\.5 Å"):
        atoms.get_potential_energy()


def test_an_element_that_it_was_not_trained_on(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.disable(logging.NOTSET)
    _tell_of_elements.cache_clear()
    path = tmp_path / "student.pt"
    path.write_bytes(checkpoints["painn"].read_bytes())
    path.with_suffix(".json").write_text(json.dumps({"elements": ["H", "O", "Cu", "Pt"]}))
    student = StudentCalculator(path, device="cpu")
    assert "which elements" not in caplog.text
    for _ in range(2):
        StudentCalculator(checkpoints["painn"], device="cpu")
    assert caplog.text.count("says which elements the model was trained on") == 1
    with pytest.raises(UserError, match=r"holds C, which .* does not know"):
        answers(student, molecule("CH4"))
    with pytest.raises(UserError, match="1 to 83"):
        answers(
            StudentCalculator(checkpoints["painn"], device="cpu"), Atoms("U2", [[0] * 3, [2] * 3])
        )


def test_elements_of_a_run_are_those_of_its_data(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.disable(logging.NOTSET)
    _tell_of_elements.cache_clear()
    contents = read_checkpoint(checkpoints["painn"])
    contents["config"]["dataset"]["src"] = str(tmp_path / "data" / "train")
    path = tmp_path / "best_checkpoint.pt"
    write_checkpoint(contents, path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "card.json").write_text(json.dumps({"elements": ["H", "O"]}))
    with pytest.raises(UserError, match=r"holds C, which .* does not know"):
        answers(StudentCalculator(path, device="cpu"), molecule("CH4"))
    assert "which elements" not in caplog.text


@pytest.mark.parametrize("skin", [0, 0.0, -1, 1e-3, None, "wide", float("nan"), float("inf"), True])
def test_a_skin_that_is_none(checkpoints: dict[str, Path], skin: Any) -> None:
    with pytest.raises(UserError, match=r"skin is .* at least 0\.01"):
        StudentCalculator(checkpoints["painn"], skin=skin)


def test_files_that_are_no_models(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.pt"):
        StudentCalculator(tmp_path / "missing.pt")
    with pytest.raises(UserError, match=r"neither best_checkpoint\.pt nor checkpoint\.pt"):
        StudentCalculator(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"text\.pt"):
        StudentCalculator(tmp_path / "text.pt")
    with pytest.raises(UserError, match="may be cpu or cuda"):
        StudentCalculator(checkpoints["painn"], device="abacus")
    # a PaiNN whose forces stock takes from the gradient of its features
    contents = torch.load(checkpoints["painn"], weights_only=True)
    contents["config"]["model"]["direct_forces"] = False
    keys = [key for key in contents["state_dict"] if "out_forces" in key]
    contents["state_dict"] = {k: v for k, v in contents["state_dict"].items() if k not in keys}
    write_checkpoint(contents, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="gradient of the node features"):
        StudentCalculator(tmp_path / "wrong.pt")


@pytest.mark.parametrize("pbc", [True, (True, True, False)])
@pytest.mark.parametrize("flavour", ["painn", "painn_energy"])
def test_along_an_axis_without_an_edge_nothing_is_periodic(
    checkpoints: dict[str, Path], flavour: str, pbc: Any
) -> None:
    """ASE completes a cell by 1 Å, which is none of a structure; alone it is as in a batch."""
    student = StudentCalculator(checkpoints[flavour], device="cpu")
    for cell, periodic in (((0, 0, 0), False), ((9, 8, 0), (True, True, False))):
        meant, given = molecule("CH3CH2OH"), molecule("CH3CH2OH")
        meant.set_cell(cell)
        given.set_cell(cell)
        meant.pbc, given.pbc = periodic, pbc
        energy, forces = answers(student, meant)
        found, pulls = answers(student, given)
        assert found == pytest.approx(energy, abs=3e-5)
        np.testing.assert_allclose(pulls, forces, atol=3e-5)
        in_a_batch = student.calculate_batch([given, bulk("Cu")])[0]
        assert in_a_batch["energy"] == pytest.approx(energy, abs=1e-4)
        with pytest.raises(PropertyNotImplementedError, match=r"has no stress|have an edge"):
            given.get_stress()
        assert np.isfinite(given.get_forces()).all()


@pytest.mark.parametrize("pbc", [False, (False, False, True)])
def test_far_from_the_origin_it_is_as_near(student: StudentCalculator, pbc: Any) -> None:
    """float32, in which models take positions, rounds by 0.06 Å there."""
    near = molecule("CH3CH2OH")
    near.set_cell([7, 8, 9])
    near.pbc = pbc
    energy, forces = answers(student, near)
    far = near.copy()
    far.positions += [1e6, -3e5, 90.0]
    for atoms in (far, far[::-1]):
        found, pulls = answers(student, atoms)
        assert found == pytest.approx(energy, abs=2e-5)
    np.testing.assert_allclose(pulls[::-1], forces, atol=2e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_it_can_be_copied_and_sent_to_another_process(
    checkpoints: dict[str, Path], flavour: str
) -> None:
    student, atoms = StudentCalculator(checkpoints[flavour], device="cpu"), structures(1)[0]
    energy, _ = answers(student, atoms)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        moved = atoms.copy()
        moved.rattle(0.05, seed=1)
        expected = answers(StudentCalculator(checkpoints[flavour], device="cpu"), moved)
        found = answers(other, moved)
        assert found[0] == pytest.approx(expected[0], abs=3e-5)
        np.testing.assert_allclose(found[1], expected[1], atol=3e-5)
        assert answers(student, atoms)[0] == energy


def test_a_cell_that_is_flat(student: StudentCalculator) -> None:
    flat = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], cell=[[9, 0, 0], [9, 0, 0], [0, 0, 9]], pbc=True)
    with pytest.raises(UserError, match=r"flat|plane"):
        student.calculate_batch([flat, molecule("H2")])
    with pytest.raises(UserError, match="without atoms"):
        student.calculate_batch([Atoms()])


def test_it_is_at_hand_in_the_package(checkpoints: dict[str, Path]) -> None:
    logging.disable(logging.NOTSET)
    assert fairchem_kd.StudentCalculator is StudentCalculator
    assert "StudentCalculator" in dir(fairchem_kd)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_the_edges_are_those_of_stocks_search(pbc: tuple[bool, ...]) -> None:
    """Of a skewed cell narrower than the reach and of a second structure, in stock's order."""
    chance = np.random.default_rng(0)
    cell = [[4.0, 0.0, 0.0], [1.5, 5.0, 0.0], [-1.0, 0.5, 9.0]]
    made = [
        Atoms("Cu" * n, cell=cell, scaled_positions=chance.random((n, 3)), pbc=pbc) for n in (5, 3)
    ]
    batch = Systems(made, torch.device("cpu")).batch
    found = _search(batch, 6.0)
    squares = _lengths(batch, found).square()
    edge_index, cell_offsets, _ = radius_graph_pbc(batch, 6.0, 10**6, True)
    kept = (squares <= 36.0) & (squares > 1e-4)
    assert torch.equal(found.edge_index[:, kept], edge_index)
    assert torch.equal(found.cell_offsets[kept], cell_offsets)
    assert (~kept).sum() < 3  # to rounding, no more than that is looked for


def _lengths(batch: Any, found: Any) -> torch.Tensor:
    source, target = found.edge_index
    return (batch.pos[target] - (batch.pos[source] + found.offsets)).norm(dim=1)


def test_a_cell_that_is_far_too_small(student: StudentCalculator) -> None:
    atoms = Atoms("H" * 200, positions=np.random.default_rng(0).random((200, 3)), cell=[0.2] * 3)
    atoms.pbc = True
    with pytest.raises(UserError, match="too many: look at the cell"):
        answers(student, atoms)
