"""A student in torch-sim: its own checks of a model, and dynamics and relaxations through it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from models import fit_scales, structures
from trainings import config, trainer
from trainings import data as data

from fairchem_kd.errors import UserError
from fairchem_kd.md import StudentCalculator

needs_torch_sim = pytest.mark.skipif(
    importlib.util.find_spec("torch_sim") is None, reason="torch-sim-atomistic is not installed"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """An untrained conservative PaiNN."""
    arguments = config(tmp_path_factory.mktemp("student"), data, model="painn_energy")
    arguments["task"]["conservative"] = True
    with trainer(arguments) as built:
        fit_scales(built.model)
        return Path(built.save(checkpoint_file="student.pt", training_state=False))


@pytest.fixture
def model(checkpoint: Path) -> Any:
    from fairchem_kd.md.torch_sim import StudentModel

    return StudentModel(checkpoint, device="cpu")


def slabs() -> list[Atoms]:
    made = structures(3)
    for atoms in made:
        atoms.set_constraint()
        atoms.calc = None
    return made


def state_of(made: list[Atoms]) -> Any:
    import torch_sim

    return torch_sim.io.atoms_to_state(made, torch.device("cpu"), torch.float64)


@needs_torch_sim
def test_it_passes_torch_sims_own_checks(model: Any) -> None:
    from torch_sim.models.interface import validate_model_outputs

    validate_model_outputs(model, torch.device("cpu"), torch.float64)


@needs_torch_sim
def test_the_numbers_are_the_calculators(model: Any, checkpoint: Path) -> None:
    made = slabs()
    found = model(state_of(made))
    assert found["energy"].dtype == found["forces"].dtype == torch.float64
    calculator = StudentCalculator(checkpoint, device="cpu")
    expected = calculator.calculate_batch(made)
    np.testing.assert_allclose(found["energy"], [one["energy"] for one in expected], atol=1e-6)
    forces = np.concatenate([one["forces"] for one in expected])
    np.testing.assert_allclose(found["forces"], forces, atol=1e-5)
    other = model(state_of(made[:1]))  # another batch
    np.testing.assert_allclose(other["energy"], found["energy"][:1], atol=1e-5)
    made[0].set_cell(made[0].cell * 1.01, scale_atoms=True)
    assert float(model(state_of(made))["energy"][0]) != float(found["energy"][0])


@needs_torch_sim
def test_batched_dynamics_keep_each_energy(model: Any) -> None:
    import torch_sim as ts

    searches = model._calculator.searches
    kinetic: list[Any] = []

    def total(state: Any) -> Any:
        own = 0.5 * (state.momenta**2).sum(dim=1) / state.masses
        each = torch.zeros(3, dtype=torch.float64).index_add(0, state.system_idx, own)
        return state.energy + each

    dt = torch.tensor(0.5e-3 * ts.units.MetalUnits.time, dtype=torch.float64)
    kT = torch.tensor(300.0 * ts.units.MetalUnits.temperature, dtype=torch.float64)
    state, step = _nve(ts, model, state_of(slabs()), dt, kT)
    for _ in range(40):
        kinetic.append(total(state))
        state = step(state)
    spread = torch.stack(kinetic).std(dim=0) / 13
    assert spread.max() < 1e-3
    assert model._calculator.searches < searches + 20


def _nve(ts: Any, model: Any, start: Any, dt: Any, kT: Any) -> tuple[Any, Any]:
    """torch-sim 0.3 has a pair of functions, later releases have two."""
    if hasattr(ts, "nve_init"):
        state = ts.nve_init(start, model, kT=kT, seed=0)
        return state, lambda state: ts.nve_step(state, model, dt=dt)
    from torch_sim.integrators import nve

    begin, update = nve(model, dt=dt, kT=kT, seed=0)
    return begin(start), update


@needs_torch_sim
def test_energies_alone_are_refused(tmp_path: Path, data: Path) -> None:
    from fairchem_kd.md.torch_sim import StudentModel

    arguments = config(tmp_path, data, model="painn_energy")
    with trainer(arguments) as built:
        fit_scales(built.model)
        path = built.save(checkpoint_file="energies.pt", training_state=False)
    with pytest.raises(UserError, match="predicts no forces"):
        StudentModel(path, device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch_sim") is not None, reason="it is installed")
def test_without_torch_sim_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "fairchem_kd.md.torch_sim", raising=False)
    with pytest.raises(UserError, match="pip install torch-sim-atomistic"):
        import fairchem_kd.md.torch_sim  # noqa: F401


@needs_torch_sim
def test_the_stress_is_the_calculators(model: Any, checkpoint: Path) -> None:
    made = slabs()
    assert "stress" not in model(state_of(made))
    model.compute_stress = True
    found = model(state_of(made))["stress"]
    assert found.shape == (3, 3, 3)
    expected = StudentCalculator(checkpoint, device="cpu").calculate_batch(made, stress=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one, voigt_6_to_full_3x3_stress(other["stress"]), rtol=1e-4, atol=1e-8
        )
    before = model(state_of(made))["energy"]
    for atoms, one in zip(made, found.numpy(), strict=True):  # a step down the slope
        downhill = np.eye(3) - 2e-3 * one / np.abs(one).max()
        atoms.set_cell(atoms.cell.array @ downhill, scale_atoms=True)
    assert (model(state_of(made))["energy"] < before).all()


@needs_torch_sim
def test_direct_forces_have_no_stress(tmp_path: Path, data: Path) -> None:
    from fairchem_kd.md.torch_sim import StudentModel

    with trainer(config(tmp_path, data, model="painn")) as built:
        fit_scales(built.model)
        path = built.save(checkpoint_file="direct.pt", training_state=False)
    with pytest.raises(UserError, match="has no stress"):
        StudentModel(path, device="cpu", compute_stress=True)
    model = StudentModel(path, device="cpu")
    with pytest.raises(NotImplementedError, match="has no stress"):
        model.compute_stress = True
    assert not model.compute_stress
