"""``fairchem-kd physics``: potentials that are one and that are none, and the command."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import fcc111, molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, Hookean
from ase.md.verlet import VelocityVerlet
from models import structures
from trainings import config, inside, trainer, write_home

from fairchem_kd.analysis.physics import study as physics_study
from fairchem_kd.analysis.physics.dynamics import Dynamics, run_dynamics
from fairchem_kd.analysis.physics.measure import (
    Consistency,
    Relaxation,
    Scan,
    against,
    check_forces,
    find_bond,
    free_atoms,
    relax,
    scan_bond,
)
from fairchem_kd.analysis.physics.runs import _models
from fairchem_kd.analysis.physics.summary import Findings, summarise, wilson
from fairchem_kd.analysis.subjects.calculators import atoms_of, make_calculator
from fairchem_kd.analysis.subjects.reference_method import EMT as EMT_METHOD
from fairchem_kd.analysis.subjects.reference_method import XTB, method_calculator, method_of
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.commands import main as cli

SHORT = ["--structures", "2", "--md-steps", "4", "--relax-steps", "3", "--cpu"]


class Spring(Calculator):
    """Two atoms on a spring of k = 20 eV/Å² and length 1 Å; forces off by a ``factor``."""

    implemented_properties = ("energy", "forces")

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def calculate(
        self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        vector = self.atoms.positions[1] - self.atoms.positions[0]
        stretch = np.linalg.norm(vector) - 1.0
        pull = 20.0 * stretch * vector / np.linalg.norm(vector)
        self.results = {
            "energy": 10.0 * stretch**2,
            "forces": self.factor * np.array([pull, -pull]),
        }


def pair(distance: float = 1.1) -> Atoms:
    return Atoms("OH", positions=[(0, 0, 0), (distance, 0, 0)])


def dynamics(calculator: Calculator, atoms: Atoms, **more: Any) -> Dynamics:
    (found,) = run_dynamics(calculator, [atoms], **more)
    return found


def test_dynamics_of_a_potential_keep_their_energy() -> None:
    found = dynamics(Spring(), pair(), steps=400, time_step=0.2, temperature=0.0)
    assert found.stable
    assert len(found.energy) == 401
    assert found.drift is not None
    assert found.fluctuation is not None
    assert abs(found.drift) < 2e-3
    # forces that are too strong gain and lose energy with the stretch: 0.1 eV and more on the way
    wrong = dynamics(Spring(2.0), pair(1.15), steps=400, time_step=0.2, temperature=0.0)
    assert wrong.fluctuation is not None
    assert wrong.fluctuation > 20 * found.fluctuation
    again = dynamics(Spring(), pair(), steps=5, seed=1)
    assert again == dynamics(Spring(), pair(), steps=5, seed=1)
    assert again.energy != dynamics(Spring(), pair(), steps=5, seed=2).energy


def test_drift_is_the_slope_of_energy_per_atom_and_picosecond() -> None:
    steps = np.arange(101)
    noise = 1e-3 * (-1.0) ** steps
    found = Dynamics((0.002 * steps * 0.5 / 1000 + noise).tolist(), 0.5, 100, True, "")
    assert found.drift == pytest.approx(0.002, abs=1e-3)
    assert found.fluctuation == pytest.approx(1e-3, rel=0.01)
    assert Dynamics([0.0], 0.5, 100, False, "x").drift is None


def test_a_drift_over_less_than_a_picosecond_is_warned_of() -> None:
    """Its slope is that of the energy's fluctuation: a tenth of a period's, say."""
    swing = [1e-3 * np.sin(2 * np.pi * step / 400) for step in range(4001)]
    short, long = (Dynamics(swing[:n], 0.5, n, True, "") for n in (101, 4001))
    assert short.drift is not None
    assert long.drift is not None
    assert short.drift > 100 * abs(long.drift)
    told = physics_study.Settings(md_steps=200, time_step=0.5).caution
    assert "Over 0.1 ps" in told
    assert "1 ps or more (--md-steps)" in told
    assert not physics_study.Settings(md_steps=2000, time_step=0.5).caution
    assert not physics_study.Settings(md_steps=4000, time_step=0.25).caution


def test_dynamics_that_break_are_said_to() -> None:
    pushed = dynamics(Spring(-1.0), pair(0.8), steps=2000, temperature=0.0)
    assert not pushed.stable
    assert re.search("O and H 0.3. Å apart|a force of|a temperature of", pushed.reason)
    assert len(pushed.energy) < 2001

    class Broken(Spring):
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            if abs(np.linalg.norm(self.atoms.positions[1]) - 1.1) > 1e-3:
                self.results["forces"] *= np.nan

    found = dynamics(Broken(), pair(), steps=50)
    assert (found.stable, found.reason) == (False, "a value is not finite")


class Many(Spring):
    """Answers about several at once, and about none where one of them is too long."""

    batches = 0

    def calculate(self, atoms: Any = None, *args: Any, **kwargs: Any) -> None:
        if atoms.get_distance(0, 1) > 1.4:
            raise CalculationFailed("too long")
        super().calculate(atoms, *args, **kwargs)

    def calculate_batch(self, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
        type(self).batches += 1
        found = []
        for atoms in structures:
            self.calculate(atoms, ["energy", "forces"], all_changes)
            found.append(dict(self.results))
        return found


def test_dynamics_side_by_side_are_those_of_each_alone() -> None:
    """Of what is held and of what ends early as well, and as ASE's own integrator has them."""
    half = pair(1.05)
    half.set_constraint(FixAtoms([0]))
    structures = [pair(), half, pair(1.41), pair(1.02)]
    together = run_dynamics(Many(), structures, steps=60, temperature=100.0, seed=3)
    assert Many.batches >= 60
    assert [one.reason for one in together] == ["", "", "too long", ""]
    assert (together[2].energy, together[2].drift) == ([0.0], None)
    for number, atoms in enumerate(structures):
        (alone,) = run_dynamics(Many(), [atoms], steps=60, temperature=100.0, seed=3 + number)
        assert alone == together[number]
        if number == 2:
            continue
        system = atoms.copy()
        system.calc = Spring()
        spread = np.sqrt(units.kB * 100.0 * system.get_masses())[:, None]
        rng = np.random.default_rng(3 + number)
        system.set_momenta(spread * rng.normal(size=(2, 3)))
        energies = [system.get_total_energy() / 2]
        integrator = VelocityVerlet(system, timestep=0.5 * units.fs)
        for _ in range(60):
            integrator.run(1)
            energies.append(system.get_total_energy() / 2)
        np.testing.assert_allclose(alone.energy, np.array(energies) - energies[0], atol=1e-10)
    # where the calculator knows one at a time, they are the same
    one_by_one = run_dynamics(Spring(), [pair(), half], steps=60, temperature=100.0, seed=3)
    assert one_by_one == together[:2]


@pytest.mark.parametrize("calculator", [Spring(), Many()])
def test_a_constraint_that_has_an_energy_counts_once(calculator: Calculator) -> None:
    held = pair(1.1)
    held.set_constraint(Hookean(0, 1, k=30.0, rt=1.0))
    found = dynamics(calculator, held, steps=100, time_step=0.1, temperature=0.0)
    assert np.abs(found.energy).max() < 5e-4  # 0.15 eV are the constraint's at first


def test_relaxations_and_how_far_they_end_from_the_methods_own() -> None:
    relaxation, end = relax(Spring(), pair(1.3), fmax=0.01)
    assert relaxation.converged
    assert end.get_distance(0, 1) == pytest.approx(1.0, abs=1e-3)
    unfinished, _ = relax(Spring(), pair(1.3), fmax=1e-9, steps=1)
    assert (unfinished.converged, unfinished.steps) == (False, 1)
    far = end.copy()
    far.positions[1] += (0.2, 0, 0)
    found = against(relaxation, far, Spring(), end)
    assert found.energy_above == pytest.approx(10.0 * 0.2**2, abs=1e-3)
    assert found.displacement == pytest.approx(0.2 / np.sqrt(2))
    # through the cell's boundary, over the free atoms alone
    slab = fcc111("Cu", (1, 1, 2), vacuum=5.0, periodic=True)
    slab.set_constraint(FixAtoms(indices=[0]))
    moved = slab.copy()
    moved.positions[1] += slab.cell[0] + (0.1, 0, 0)
    assert against(relaxation, moved, EMT(), slab).displacement == pytest.approx(0.1)
    assert free_atoms(slab).tolist() == [1]


def test_forces_against_differences_of_the_energy() -> None:
    [slab] = structures(1)
    found = check_forces(EMT(), slab, directions=4, step=0.005)
    np.testing.assert_allclose(found.forces, found.differences, atol=2e-3)
    assert np.abs(found.forces).max() > 0.05
    wrong = check_forces(Spring(1.5), pair(), directions=4)
    np.testing.assert_allclose(wrong.forces, 1.5 * np.array(wrong.differences), rtol=0.05)
    assert check_forces(EMT(), slab, seed=1) != check_forces(EMT(), slab, seed=2)


def test_bond_scans() -> None:
    water = molecule("H2O")
    stays, moves = find_bond(water) or (-1, -1)
    assert (water.symbols[stays], water.symbols[moves]) == ("O", "H")
    # an atom at the end of a molecule, though the bond inside is tighter and moving C hits others
    acetylene = molecule("C2H2")
    stays, moves = find_bond(acetylene) or (-1, -1)
    assert (acetylene.symbols[stays], acetylene.symbols[moves]) == ("C", "H")
    assert acetylene.get_distance(stays, moves) < 1.1
    monoxide = molecule("CO")
    assert find_bond(monoxide) == (monoxide.symbols.search("O")[0], monoxide.symbols.search("C")[0])
    [slab] = structures(1)  # oxygen on copper: the adsorbate moves, though copper is as tight
    stays, moves = find_bond(slab) or (-1, -1)
    assert (slab.symbols[stays], slab.symbols[moves]) == ("Cu", "O")
    slab.set_constraint(FixAtoms(indices=range(len(slab))))
    assert find_bond(slab) is None
    scan = scan_bond(Spring(), pair(1.1), (0, 1), points=41)
    assert (scan.lengths[0], scan.lengths[-1]) == pytest.approx((0.85 * 1.1, 1.35 * 1.1))
    np.testing.assert_allclose(scan.energies, 10 * (np.array(scan.lengths) - 1) ** 2, atol=1e-9)
    assert scan.turns == 1
    assert scan.mismatch < 1e-6
    assert scan_bond(Spring(1.1), pair(), (0, 1)).mismatch > 0.1
    rough = Scan("O-H", scan.lengths, [0.0, 0.1] * 20 + [0.0], scan.forces)
    assert rough.turns == 39
    shifted = Scan("O-H", scan.lengths, [e + 7 for e in scan.energies], scan.forces)
    assert scan.error(shifted) == pytest.approx(0.0, abs=1e-12)


def findings(mismatches: list[list[float]]) -> Findings:
    """Of structures whose forces are off by so much along each direction, from slopes of 1 eV/Å."""
    found = Findings()
    for off in mismatches:
        found.consistency.append(Consistency([1 + value for value in off], [1.0] * len(off)))
        energy = [0.0, off[0], 2 * off[0]]
        found.dynamics.append(Dynamics(energy, 1.0, 2, off[0] < 0.5, ""))
        found.relaxations.append(Relaxation(off[0] < 0.5, 7))
        found.scans.append(None)
    return found


def test_figures_with_what_they_are_uncertain_by() -> None:
    chance = np.random.default_rng(0)
    off = np.abs(chance.normal(0.2, 0.05, (3, 40, 2)))  # seeds, structures, directions
    found = summarise([findings(one.tolist()) for one in off], None)
    mismatch = found["force_mismatch"]
    assert mismatch is not None
    assert mismatch.value == pytest.approx(off.mean())
    assert mismatch.over_seeds == pytest.approx(off.mean(axis=(1, 2)).std(ddof=1))
    assert mismatch.over_structures is not None
    low, high = mismatch.over_structures
    expected = off.mean(axis=(0, 2)).std(ddof=1) / np.sqrt(40)  # of a mean, by theory
    assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.1)
    assert (high + low) / 2 == pytest.approx(off.mean(), rel=0.02)
    relative = found["force_mismatch_relative"]
    assert relative is not None
    assert relative.value == pytest.approx(np.mean(np.sqrt(np.mean(off**2, axis=(1, 2)))))
    drift = found["md_drift"]
    assert drift is not None
    assert drift.value == pytest.approx(np.mean(np.median(off[:, :, 0], axis=1)) * 1000)
    assert found["scan_error"] is found["scan_turns"] is found["relax_energy_above"] is None

    [alone] = [summarise([findings([[0.1]])], None)]
    assert alone["force_mismatch"] is not None
    assert alone["force_mismatch"].over_structures is None
    assert alone["force_mismatch"].over_seeds is None
    # all of five is not certainty
    share = summarise([findings([[0.1]] * 5)], None)["md_stable"]
    assert share is not None
    assert share.value == 1.0
    assert share.over_structures == pytest.approx((0.566, 1.0), abs=1e-3)
    assert wilson(0.25, 8) == pytest.approx((0.071, 0.591), abs=1e-3)


def test_methods_are_those_of_the_labels(tmp_path: Path) -> None:
    assert method_of({"build": {"recipe": "slabs"}, "src": "a/b"}) == EMT_METHOD
    assert method_of({"build": "collisions"}) == XTB
    assert method_of({"src": str(tmp_path / "test")}) is None
    (tmp_path / "card.json").write_text('{"options": {"recipe": "collisions"}}')
    assert method_of({"src": str(tmp_path / "test")}) == XTB
    pytest.importorskip("tblite")
    water = molecule("H2O")
    water.set_cell([40, 40, 40])
    water.pbc = True
    water.calc = method_calculator(XTB)
    energy = water.get_potential_energy()
    assert -141 < energy < -136  # -5.07 Hartree
    found = check_forces(method_calculator(XTB), water, directions=2, step=0.005)
    np.testing.assert_allclose(found.forces, found.differences, atol=5e-3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data, a teacher, a student that says it was distilled."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home({"train": 8, "val": 4, "test": 4}, model="painn")
        Path("data/card.json").write_text('{"options": {"recipe": "slabs"}}')
        run = config(Path("."), Path("data"), losses={"n2n": {}}, teacher=Path("teacher.pt"))
        for name, seed in (("n2n", 3), ("n2n-again", 4)):
            with trainer(run, identifier=name, seed=seed) as built:
                path = built.save(checkpoint_file=f"{name}.pt", training_state=False)
            Path(path).rename(f"{name}.pt")
        run = config(Path("."), Path("data"), model="painn_energy")
        del run["outputs"]["forces"]
        run["loss_functions"] = run["loss_functions"][:1]
        run["evaluation_metrics"] = {
            "metrics": {"energy": ["mae"]},
            "primary_metric": "energy_mae",
        }
        with trainer(run, identifier="energy") as built:
            Path(built.save(checkpoint_file="energy.pt", training_state=False)).rename("energy.pt")
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(home)
    yield
    torch.set_flush_denormal(False)


def test_the_calculator_is_the_model(home: Path) -> None:
    model = load_model(read_model("n2n.pt"))
    calculator = make_calculator(read_model("n2n.pt"))
    with open_structures("data/test") as opened:
        [batch] = opened.batches(9)
        atoms = atoms_of(opened)
    expected = model.denormalized(model.forward(batch), batch)
    rows = torch.split(expected["forces"], batch.natoms.tolist())
    for number, system in enumerate(atoms):
        system.calc = calculator
        assert system.get_potential_energy() == pytest.approx(
            expected["energy"][number].item(), 1e-4
        )
        forces = system.get_forces(apply_constraint=False)
        np.testing.assert_allclose(forces, rows[number].numpy(), atol=1e-4)
        assert len(free_atoms(system)) == int((batch.fixed[batch.batch == number] == 0).sum())


def test_a_model_called_teacher_is_not_taken_for_the_runs_own(home: Path) -> None:
    files = _models(["teacher=n2n-again.pt", "n2n.pt"], teacher=None, trust=False)
    found = {label: [file.path.name for file in seeds] for label, seeds in files.items()}
    assert found == {
        "teacher teacher": ["teacher.pt"],
        "teacher": ["n2n-again.pt"],
        "n2n": ["n2n.pt"],
    }


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["physics", "mine=n2n*.pt", *SHORT, "--out", "out"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\nmine +\d+ ± \d+ \[\d+, \d+\] ", text)
    for title in ("NVE dynamics", "Relaxations", "Forces and bond scans"):
        assert f"{title}\n" in text
    results = json.loads(Path("out/physics.json").read_text())
    assert list(results["models"]) == ["teacher", "mine", "EMT"]
    assert (results["method"], results["structures"]) == ("EMT", 2)
    truth, mine = results["models"]["EMT"]["summary"], results["models"]["mine"]["summary"]
    assert truth["md_stable"] == {
        "value": 1.0,
        "over_structures": pytest.approx(wilson(1.0, 2)),
        "over_seeds": None,
    }
    assert truth["relax_energy_above"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert truth["scan_error"]["value"] == 0.0
    assert truth["force_mismatch_relative"]["value"] < 0.02
    relative = mine["force_mismatch_relative"]
    assert relative["value"] > 0.1  # an untrained model with direct forces
    low, high = relative["over_structures"]
    assert low <= relative["value"] <= high
    assert relative["over_seeds"] > 0
    one, other = results["models"]["mine"]["seeds"]
    assert len(one["dynamics"]) == len(other["dynamics"]) == 2
    assert one["dynamics"] != other["dynamics"]
    assert all(len(r["energy"]) <= 5 for r in one["dynamics"])
    for name in ("physics_summary", "physics_dynamics", "physics_scans"):
        assert Path(f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "time (fs)" in Path("out/physics_dynamics.svg").read_text()
    assert "distance (Å)" in Path("out/physics_scans.svg").read_text()
    assert "| mine |" in Path("out/physics.md").read_text()


def test_an_interruption_ends_in_a_sentence(
    home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(physics_study, "run_dynamics", interrupted)
    argv = ["physics", "n2n.pt", "--cpu", "--out", "never"]
    assert cli.main(argv) == 130
    assert "stopped: fairchem-kd physics; the files it had written are whole" in (
        capsys.readouterr().err
    )
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["n2n.pt", "mine=n2n.pt"], "n2n.pt is given twice"),
        (["mine=none*.pt"], r"Nothing in .* matches none\*.pt"),
        (["energy.pt"], "predicts no forces"),
        (["nothing.pt"], "nothing.pt does not exist"),
        (["n2n.pt", "--md-steps", "0"], "--md-steps must be more than 1"),
        (["n2n.pt", "--data", "none.traj"], "none.traj does not exist"),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["physics", *argv]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert re.search(sentence, text), text
