"""Module files: stock's numbers without fairchem, and what goes wrong in words."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.io import write
from bundles import assert_one_file
from models import fit_scales, small_model, structures
from trainings import config, trainer
from trainings import data as data

from fairchem_kd import ModuleCalculator, StudentCalculator
from fairchem_kd.commands.main import main
from fairchem_kd.errors import UserError
from fairchem_kd.md import Exploded
from fairchem_kd.md.module import read_about
from fairchem_kd.md.standalone import LOADER, MODULES, loader
from fairchem_kd.models.file import write_checkpoint
from fairchem_kd.models.module import network_of
from fairchem_kd.models.module_file import ABOUT

FLAVOURS = ("painn", "painn_energy", "schnet")
REFERENCES = torch.linspace(-3.0, 4.0, 119)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, tuple[Path, Path]]:
    """Untrained models: each its checkpoint, with element references, and its module."""
    root, found = tmp_path_factory.mktemp("modules"), {}
    for flavour in FLAVOURS:
        arguments = config(root, data, model=flavour)
        arguments["task"]["conservative"] = flavour == "painn_energy"
        if flavour == "painn":
            arguments["model"]["max_neighbors"] = 20  # fewer than there are
        with trainer(arguments, identifier=flavour) as built:
            fit_scales(built.model, 1.2)
            path = Path(built.save(checkpoint_file=f"{flavour}.pt", training_state=False))
        contents = torch.load(path, weights_only=True)
        contents["elementrefs"] = {"energy": {"element_references": REFERENCES}}
        write_checkpoint(contents, root / f"{flavour}.pt")
        module = root / flavour / "student.pt2"
        elements = ["--elements", "H", "O", "Cu", "Pt", "C"]
        assert (
            main(["export", str(root / f"{flavour}.pt"), "--module", str(module), *elements]) == 0
        )
        found[flavour] = (root / f"{flavour}.pt", module)
    return found


@pytest.fixture(scope="module")
def modules(files: dict[str, tuple[Path, Path]]) -> dict[str, ModuleCalculator]:
    return {flavour: ModuleCalculator(module) for flavour, (_, module) in files.items()}


def answers(calculator: Any, atoms: Atoms) -> tuple[float, np.ndarray]:
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_numbers_are_the_checkpoints_along_a_walk(
    files: dict[str, tuple[Path, Path]], flavour: str
) -> None:
    """Through the cell's faces, and out of the skin; with one edge more or less now and then."""
    checkpoint, module = files[flavour]
    student = StudentCalculator(checkpoint, device="cpu")
    ours = ModuleCalculator(module, skin=0.8)
    chance, atoms = np.random.default_rng(1), structures(2)[1]
    atoms.positions -= atoms.positions[-1]  # an atom on a face, which steps over it
    steps = 12
    for _ in range(steps):
        atoms.positions += chance.normal(0, 0.06, atoms.positions.shape)
        energy, forces = answers(student, atoms)
        found, pulls = answers(ours, atoms)
        assert found == pytest.approx(energy, abs=1e-4)
        np.testing.assert_allclose(pulls, forces, atol=5e-5)
    assert 1 < ours.searches < steps


def test_of_neighbours_that_are_equally_far_those_of_the_checkpoint_are_kept(
    files: dict[str, tuple[Path, Path]], modules: dict[str, ModuleCalculator]
) -> None:
    """In a lattice, and an atom's images on both sides wherever; which are kept tells by 12 meV."""
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
    student = StudentCalculator(files["painn"][0], device="cpu")
    for _ in range(3):
        energy, forces = answers(student, atoms)
        found, pulls = answers(modules["painn"], atoms)
        assert found == pytest.approx(energy, abs=2e-4)
        np.testing.assert_allclose(pulls, forces, atol=5e-5)
        atoms.positions += 0.05  # within the skin


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "atoms",
    [
        molecule("CH3CH2OH"),
        structures(1)[0],
        bulk("Cu"),  # one atom, whose neighbours are its images
        Atoms("OH", [[0, 0, 0], [0, 0, 1]], cell=[[5, 0, 0], [2, 6, 0], [0, 0, 9]], pbc=[1, 0, 1]),
    ],
    ids=lambda atoms: atoms.get_chemical_formula(),
)
def test_any_periodicity_and_number_of_atoms(
    files: dict[str, tuple[Path, Path]],
    modules: dict[str, ModuleCalculator],
    flavour: str,
    atoms: Atoms,
) -> None:
    """One file for all of them."""
    checkpoint, _ = files[flavour]
    atoms = atoms.copy()
    energy, forces = answers(StudentCalculator(checkpoint, device="cpu"), atoms)
    found, pulls = answers(modules[flavour], atoms)
    assert found == pytest.approx(energy, abs=1e-4)
    np.testing.assert_allclose(pulls, forces, atol=5e-5)


def test_it_works_where_fairchem_and_fairchem_kd_cannot_be_imported(
    files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, module = files["painn_energy"]
    atoms = structures(2)[1]
    energy, forces = answers(StudentCalculator(checkpoint, device="cpu"), atoms)
    atoms.calc = None
    write(tmp_path / "slab.traj", atoms)
    (tmp_path / "script.py").write_text(
        """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairchem", "fairchem_kd", "torch_geometric", "yaml"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Wall())
import json
from ase.io import read
from kd_student import ModuleCalculator

atoms = read("slab.traj")
atoms.calc = ModuleCalculator(sys.argv[1])
print(json.dumps([atoms.get_potential_energy(), atoms.get_forces(False).tolist()]))
"""
    )
    done = subprocess.run(
        [sys.executable, "script.py", str(module)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(module.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, pulls = json.loads(done.stdout)
    assert found == pytest.approx(energy, abs=1e-4)
    np.testing.assert_allclose(pulls, forces, atol=5e-5)


@pytest.mark.parametrize("flavour", ["painn_energy", "schnet"])
def test_in_float64_forces_and_stress_are_slopes(
    files: dict[str, tuple[Path, Path]], modules: dict[str, ModuleCalculator], flavour: str
) -> None:
    calculator = ModuleCalculator(files[flavour][1], dtype="float64")
    atoms = structures(1)[0]
    atoms.set_constraint()
    assert answers(modules[flavour], atoms)[0] == pytest.approx(
        answers(calculator, atoms)[0], abs=1e-4
    )
    forces, step = atoms.get_forces(), 1e-5
    slopes = np.zeros_like(forces)
    for place in np.ndindex(forces.shape):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[place] += sign * step
            moved.calc = calculator
            ends.append(moved.get_potential_energy())
        slopes[place] = -(ends[0] - ends[1]) / (2 * step)
    factor = 1.0
    if flavour == "schnet":  # stock's own forces are the slope of its normalised energy
        told = read_about(files[flavour][1])
        factor = told["forces"]["scale"] / told["energy"]["scale"]
        assert "stress" not in calculator.implemented_properties
    np.testing.assert_allclose(forces, factor * slopes, atol=1e-6)
    if flavour == "schnet":
        return
    strained = []
    for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        ends = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
            moved.calc = calculator
            ends.append(moved.get_potential_energy())
        strained.append((ends[0] - ends[1]) / (2 * step) / atoms.get_volume())
    np.testing.assert_allclose(atoms.get_stress(apply_constraint=False), strained, atol=1e-8)


def test_nothing_in_the_network_is_bound_to_a_device_or_a_precision(
    files: dict[str, tuple[Path, Path]],
) -> None:
    """What a CPU can show of a GPU: no operation makes a tensor of a device of its own."""
    for _, module in files.values():
        for node in torch.export.load(str(module)).graph.nodes:
            kept = {name: node.kwargs.get(name) for name in ("device", "dtype")}
            assert kept == {"device": None, "dtype": None}, (node, kept)


def test_a_structure_in_which_atoms_fly_apart_or_are_not_finite(
    modules: dict[str, ModuleCalculator], monkeypatch: pytest.MonkeyPatch
) -> None:
    calculator = modules["painn"]
    atoms = Atoms("OH", positions=[(0, 0, 0), (0, 0, 1)])
    assert np.isfinite(answers(calculator, atoms)[0])
    atoms.positions[1, 2] = 20.0
    with pytest.raises(Exploded, match=r"within 4\.5 Å of each other"):
        atoms.get_potential_energy()
    atoms.positions[1, 2] = np.nan
    with pytest.raises(Exploded, match=r"is not finite.*shorter time step"):
        atoms.get_potential_energy()
    atoms.positions[1, 2] = 1.1
    assert np.isfinite(answers(calculator, atoms)[0])
    monkeypatch.setitem(calculator.about["energy"], "scale", np.inf)
    atoms.positions[1, 2] = 1.2
    with pytest.raises(Exploded, match=r"answer for HO is not finite"):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    "atoms",
    [
        molecule("NH3"),
        *(Atoms([z, 1], [[0] * 3, [0, 0, 2]]) for z in (92, 0, 119, 200, -1)),
    ],
)
def test_elements_that_it_was_not_trained_on(
    modules: dict[str, ModuleCalculator], atoms: Atoms
) -> None:
    for flavour in ("painn", "schnet"):
        with pytest.raises(UserError, match=r"has (N|U|Z=[-\d]+), on which the model was"):
            answers(modules[flavour], atoms.copy())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skin": 0}, "skin is 0"),
        ({"skin": True}, "skin is True"),
        ({"dtype": "half"}, "dtype is 'half', and may be float32 or float64"),
        ({"device": "abacus"}, "may be cpu or cuda"),
    ],
)
def test_options_that_are_none(
    files: dict[str, tuple[Path, Path]], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ModuleCalculator(files["schnet"][1], **given)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_along_an_axis_without_an_edge_nothing_is_periodic(
    modules: dict[str, ModuleCalculator], flavour: str
) -> None:
    for cell, periodic in (((0, 0, 0), False), ((9, 8, 0), (True, True, False))):
        meant, given = molecule("CH3CH2OH"), molecule("CH3CH2OH")
        meant.set_cell(cell)
        given.set_cell(cell)
        meant.pbc, given.pbc = periodic, True
        energy, forces = answers(modules[flavour], meant)
        found, pulls = answers(modules[flavour], given)
        assert found == energy
        np.testing.assert_array_equal(pulls, forces)
        assert "stress" not in modules[flavour].results


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_it_can_be_copied_and_sent_to_another_process(
    files: dict[str, tuple[Path, Path]], flavour: str
) -> None:
    atoms = structures(1)[0]
    calculator = ModuleCalculator(files[flavour][1], skin=0.3, dtype="float64")
    expected = answers(calculator, atoms)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert (other.skin, other.dtype) == (0.3, torch.float64)
        found = answers(other, atoms)
        assert found[0] == expected[0]
        np.testing.assert_array_equal(found[1], expected[1])


def test_structures_that_are_none(modules: dict[str, ModuleCalculator]) -> None:
    calculator = modules["schnet"]
    flat = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], cell=[[9, 0, 0], [9, 0, 0], [0, 0, 9]], pbc=True)
    with pytest.raises(UserError, match="lie in a plane"):
        answers(calculator, flat)
    with pytest.raises(UserError, match="without atoms"):
        answers(calculator, Atoms())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 7, "has format 7, and this reads 1"),
        ("model", "gemnet_oc", "model is neither"),
        ("graph.cutoff", -1.0, r"graph\.cutoff is no length"),
        ("graph.cutoff", True, r"graph\.cutoff is no length"),
        ("graph.max_neighbors", 2.5, r"graph\.max_neighbors"),
        ("graph.both_ways", 1, r"graph\.both_ways"),
        ("energy", None, "energy has no scale"),
        ("energy.scale", "1", "energy has no scale"),
        ("energy.references", [1.0], "fewer than its elements"),
        ("energy.references", ["x"], "are no numbers"),
        ("forces.from", "nowhere", r"forces\.from"),
        ("forces.shift", None, "forces has no scale and shift"),
        ("numbers", 0, "no atomic number"),
        ("elements", {"H": 1}, "elements are no"),
        ("torch", 2, "torch is no version"),
    ],
)
def test_files_that_lie(
    files: dict[str, tuple[Path, Path]], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = tmp_path / "student.pt2"

    def change(told: dict[str, Any]) -> dict[str, Any]:
        made = copy.deepcopy(told)
        *folders, last = key.split(".")
        inside = made
        for folder in folders:
            inside = inside[folder]
        inside[last] = value
        return made

    rewrite(files["painn"][1], path, change)
    with pytest.raises(UserError, match=message):
        ModuleCalculator(path)


def rewrite(source: Path, path: Path, change: Any) -> None:
    """A copy of a module file with another text about it."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(path, "w") as after:
        for one in before.infolist():
            held = before.read(one)
            if one.filename.endswith(f"/{ABOUT}"):
                held = json.dumps(change(json.loads(held))).encode()
            after.writestr(one, held)


def test_files_that_are_no_modules(files: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, module = files["schnet"]
    with pytest.raises(UserError, match="does not exist"):
        ModuleCalculator(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read"):
        ModuleCalculator(tmp_path / "text.pt2")
    with pytest.raises(UserError, match="was not written by"):
        ModuleCalculator(checkpoint)
    with pytest.raises(UserError, match="no checkpoint but a module"):
        StudentCalculator(module)
    rewrite(module, tmp_path / "list.pt2", lambda told: [told])
    with pytest.raises(UserError, match="no mapping"):
        ModuleCalculator(tmp_path / "list.pt2")
    # the network is gone, or of another version of torch
    with zipfile.ZipFile(module) as before, zipfile.ZipFile(tmp_path / "half.pt2", "w") as after:
        for one in before.infolist():
            if one.filename.endswith(f"/{ABOUT}"):
                after.writestr(one, before.read(one))
    with pytest.raises(UserError, match=r"cannot load .*half\.pt2, which torch .* wrote"):
        ModuleCalculator(tmp_path / "half.pt2")


@pytest.mark.parametrize(
    ("flavour", "overrides", "message"),
    [
        ("gemnet_oc", {}, "is a GemNetOC, and modules are made of PaiNN and SchNet alone"),
        ("painn", {"use_pbc": False}, "without periodicity"),
        ("painn", {"direct_forces": False}, "forces from its node features"),
        ("schnet", {"readout": "mean"}, "the mean over its atoms"),
    ],
)
def test_models_of_which_there_is_no_module(
    flavour: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        network_of(small_model(flavour, **overrides), "student.pt")


def test_unknown_elements_are_warned_about(
    files: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = torch.load(files["schnet"][0], weights_only=True)
    contents["config"]["dataset"]["src"] = "elsewhere/train"
    path = write_checkpoint(contents, tmp_path / "student.pt")
    assert main(["export", str(path), "--module", str(tmp_path / "student.pt2")]) == 0
    assert "will not say which elements" in caplog.text
    assert read_about(tmp_path / "student.pt2")["elements"] is None


def test_the_command_refuses_before_it_works(
    files: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, module = files["schnet"]
    for words, message in (
        ([checkpoint], "nothing to write"),
        ([checkpoint, "--module", tmp_path / "x.pt"], "has to end in .pt2"),
        ([checkpoint, tmp_path / "x.pt2"], "has to end in .pt"),
        ([checkpoint, "--module", module], "give --force"),
        ([tmp_path / "none.pt", "--module", tmp_path / "x.pt2"], "none.pt"),
    ):
        assert main(["export", *map(str, words)]) == 2
        assert message in capsys.readouterr().err


def test_a_runs_folder_is_exported_as_its_best_checkpoint(
    files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(files["schnet"][0], tmp_path / "run" / "best_checkpoint.pt")
    module = tmp_path / "student.pt2"
    assert main(["export", str(tmp_path / "run"), "--module", str(module), "--elements", "O"]) == 0
    assert module.is_file()


def test_the_loader_needs_torch_numpy_scipy_and_ase_alone() -> None:
    """No name stands at the top of two of its modules, each after those that it imports."""
    assert_one_file(MODULES)
    found = set()
    for node in ast.walk(ast.parse(loader())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"ase", "numpy", "scipy", "torch"}
    assert LOADER.removesuffix(".py") in loader()
