"""What is taken of a calculator's answer, and what is refused; against loops of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from toy_calculators import Toy

from fairchem_kd.calculators.ase_files import structure_of
from fairchem_kd.calculators.asking import Calculator, NoAnswer, as_atoms, parse_features
from fairchem_kd.calculators.checks import check_forces, check_repeats, check_turning
from fairchem_kd.calculators.factory import Factory
from fairchem_kd.errors import UserError
from fairchem_kd.store import Structure

TOY = "toy_calculators:Toy"


def slab(element: str = "Cu", seed: int = 0) -> Structure:
    atoms = fcc111(element, (2, 2, 2), vacuum=6.0)
    atoms.rattle(0.1, seed=seed)
    return structure_of(atoms)


def toy(features: dict[str, str] | None = None, **arguments: Any) -> Calculator:
    return Calculator(Factory(TOY, arguments), features)


def test_an_answer_is_that_of_the_calculator_at_the_stored_positions() -> None:
    structure = slab()
    asked = Calculator(Factory("ase.calculators.emt:EMT"))
    said = asked.ask(structure)
    asked.ask(slab(seed=1))  # which must not change what was said: EMT uses its arrays again
    atoms = as_atoms(structure)
    atoms.calc = EMT()
    assert said["output:energy"][0] == atoms.get_potential_energy()
    assert np.array_equal(said["output:forces"], atoms.get_forces())
    assert np.array_equal(said["atom_energy"][:, 0], atoms.get_potential_energies())
    assert np.array_equal(said["feature:atom_energy:node"], said["atom_energy"])
    assert {c.name: (c.per, c.shape, c.dtype) for c in asked.columns or ()} == {
        "output:energy": ("structure", (1,), "<f8"),
        "output:forces": ("atom", (3,), "<f8"),
        "atom_energy": ("atom", (1,), "<f8"),
        "feature:atom_energy:node": ("atom", (1,), "<f4"),
    }


def test_shares_that_do_not_add_up_are_not_kept() -> None:
    asked = toy(shares=False)
    assert set(asked.ask(slab())) == {"output:energy", "output:forces"}


def test_features_are_arrays_of_the_results() -> None:
    asked = toy({"node": "node_features", "vector@2": "arrows"}, with_features=True)
    structure = slab()
    said = asked.ask(structure)
    pos = np.asarray(structure.pos, float)
    shifts = [np.array([i, j, 0]) @ structure.cell for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for i in (0, 5):
        near = [min(np.linalg.norm(pos[j] + s - pos[i]) for s in shifts) for j in range(8)]
        weight = sum(np.exp(-d) for j, d in enumerate(near) if j != i)
        assert said["feature:node:node"][i, 0] == pytest.approx(weight)
    forces = said["output:forces"]
    assert np.array_equal(said["feature:vector@2:vector"][:, :, 1], -2 * forces)
    assert [c.shape for c in asked.columns or () if c.name.startswith("feature:vector")] == [(3, 2)]


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ({"node": "node_features"}, {}, "its results have no 'node_features'"),
        ({"node": "arrows"}, {"with_features": True}, r"'arrows' .* not \(8, C\)"),
        ({"vector": "node_features"}, {"with_features": True}, r"not \(8, 3, C\)"),
        (None, {"fails": 29}, "^RuntimeError: the self-consistent field did not converge$"),
        (None, {"not_finite": 29}, "its energy is not finite"),
    ],
)
def test_what_is_no_answer_is_said(
    features: dict[str, str] | None, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(NoAnswer, match=message):
        toy(features, **arguments).ask(slab())


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"forces": np.zeros((3, 3))}, "its forces have the shape"),
        ({"energy": np.zeros(2)}, "its energy has the shape"),
        ({"energy": "low"}, "its energy is no array of numbers"),
        ({"forces": None}, "its forces is not finite"),
    ],
)
def test_answers_of_other_shapes_and_types(
    results: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = toy()

    def calculate(self: Toy, atoms: Any = None, *_: Any) -> None:
        self.atoms = atoms.copy()
        self.results = {"energy": 1.0, "forces": np.zeros((len(atoms), 3)), **results}

    monkeypatch.setattr(Toy, "calculate", calculate)
    with pytest.raises(NoAnswer, match=message):
        asked.ask(slab())


def _backwards(atoms: Atoms) -> None:
    for name, values in atoms.arrays.items():
        atoms.arrays[name] = values[::-1].copy()


def _moved(atoms: Atoms) -> None:
    atoms.positions[1] += 0.05


def _swollen(atoms: Atoms) -> None:
    atoms.set_cell(1.01 * np.array(atoms.cell))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_backwards, "which atoms there are, or their order"),
        (_moved, "it moves the atoms that it is given, by 0.087 Å"),
        (_swollen, "it changes the cell"),
    ],
)
def test_an_answer_about_other_atoms_than_were_given_is_none(
    change: Callable[[Atoms], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calculate = Toy.calculate
    mixed = slab()
    mixed.numbers[0] = 47

    def changing(self: Toy, atoms: Any = None, *more: Any) -> None:
        change(atoms)
        calculate(self, atoms, *more)

    monkeypatch.setattr(Toy, "calculate", changing)
    with pytest.raises(NoAnswer, match=message):
        toy().ask(mixed)


def test_atoms_that_are_wrapped_and_structures_that_are_moved_whole_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calculate = Toy.calculate
    expected = toy().ask(slab())

    def changing(self: Toy, atoms: Any = None, *more: Any) -> None:
        atoms.positions += [1.5, 2.0, 3.0]
        atoms.wrap()
        calculate(self, atoms, *more)

    monkeypatch.setattr(Toy, "calculate", changing)
    said = toy().ask(slab())
    for name, values in expected.items():
        np.testing.assert_allclose(said[name], values, atol=1e-9)


def test_periodic_structures_are_periodic_and_molecules_are_not() -> None:
    mixed = fcc111("Cu", (1, 1, 3), vacuum=6.0)
    assert not mixed.pbc.all()
    assert as_atoms(structure_of(mixed)).pbc.all()
    assert as_atoms(structure_of(bulk("Cu"))).pbc.all()
    water = as_atoms(structure_of(molecule("H2O")))
    assert not water.pbc.any()
    assert water.cell.volume > 40**3  # some calculators want one all the same
    wire = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]], cell=[50, 50, 5], pbc=[False, False, True])
    assert as_atoms(structure_of(wire)).pbc.all()


@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [({}, 1.0), ({"energy": 3.0, "forces": 3.0}, 1.0), ({"forces": 0.8}, 1.25)],
)
def test_forces_are_compared_with_the_energy(arguments: dict[str, Any], ratio: float) -> None:
    found = check_forces(toy(**arguments), [slab("Cu", i) for i in range(6)])
    assert found is not None
    assert found.structures == 4
    assert found.ratio == pytest.approx(ratio, rel=5e-3)
    assert found.conservative == (ratio == 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forces": -1.0}, "its forces point uphill"),
        ({"forces": 23.061}, "as with energies in eV and forces in kcal/mol/Å"),
        ({"energy": 1 / 27.211}, "as with energies in Hartree and forces in eV/Å"),
        ({"energy": 1 / 27.211, "forces": 1 / 51.422}, "as with forces in units per Bohr"),
        ({"forces": 0.0}, "its forces are zero where its energy changes"),
        ({"forces": 0.1}, r"its forces are not the gradient of its energy \("),
    ],
)
def test_other_units_and_signs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_forces(toy(**arguments), [slab()])


def test_what_cannot_be_compared_is_not() -> None:
    assert check_forces(toy(fails=29), [slab()]) is None
    assert check_forces(toy(energy=0.0, forces=0.0), [slab()]) is None
    alone = structure_of(Atoms("Cu"))
    assert check_forces(toy(shift=-1e5), [alone, slab()]).structures == 1


def test_a_calculator_that_says_something_else_when_it_is_asked_again_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_repeats(toy(), slab()) == []
    assert check_repeats(toy(fails=29), slab()) == []
    calculate, noise = Toy.calculate, np.random.default_rng(0)

    def noisy(self: Toy, *given: Any) -> None:
        calculate(self, *given)
        self.results["forces"] = self.results["forces"] + 0.2 * noise.normal(size=(8, 3))

    monkeypatch.setattr(Toy, "calculate", noisy)
    (said,) = check_repeats(toy(), slab())
    assert said.startswith("Asked again about the same structure it says something else (by 0 eV")


def test_features_are_turned() -> None:
    good = {"node": "node_features", "vector": "arrows"}
    assert check_turning(toy(good, with_features=True), slab()) == []
    assert check_turning(toy(with_features=True), slab()) == []
    (said,) = check_turning(toy({"node": "positions"}, with_features=True), slab())
    assert "feature:node:node changes when one turns" in said


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("EMT", None, "must read PACKAGE.MODULE:FACTORY"),
        ("ase.calculators.emt:", None, "must read PACKAGE.MODULE:FACTORY"),
        ("a b:c", None, "must read PACKAGE.MODULE:FACTORY"),
        ("no_such_package.at:All", None, "cannot be imported .* --writer FILE"),
        ("ase.calculators.emt:EMTT", None, "has no 'EMTT' .did you mean 'EMT'"),
        ("ase.calculators.emt:parameters", None, "is no class and no function"),
        ("toy_calculators:not_one", None, "makes a dict, which is no ASE calculator"),
        ("toy_calculators:WithoutForces", None, "gives no forces .it gives energy."),
        (TOY, "{", "--calculator-args: it is not JSON"),
        (TOY, "[1]", "must be a JSON object"),
        (TOY, "null", "must be a JSON object"),
        (TOY, '{"a b": 1}', "must be a JSON object"),
        (TOY, '{"a": 1, "a": 2}', "has the key 'a' twice"),
        (TOY, '{"shift": NaN}', "not finite"),
        (TOY, '{"shift": [1e999]}', "not finite"),
        (TOY, '{"colour": 1}', "cannot be made with the arguments .*colour"),
    ],
)
def test_what_makes_no_calculator_is_refused(
    path: str, arguments: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Calculator(Factory.given(path, arguments))


@pytest.mark.parametrize("given", ["head", "node=", "=x", "node@", "node@a=x", "vector@1@2", ""])
def test_features_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match="of a calculator give ADDRESS"):
        parse_features([given])


def test_features_have_keys() -> None:
    given = parse_features(["node", "vector@2=arrows", "edge=sums"])
    assert given == {"node": "node_features", "vector@2": "arrows", "edge": "sums"}
    with pytest.raises(UserError, match="has node twice"):
        parse_features(["node", "node=x"])


def test_a_calculator_is_known_by_factory_arguments_files_version_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, own = tmp_path / "weights.pt", tmp_path / "own_calculator.py"
    weights.write_bytes(b"1")
    source = "from ase.calculators.emt import EMT\ndef make(path=None):\n    return EMT()\n"
    own.write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = "own_calculator:make"

    def digest(label: str | None = None, **arguments: Any) -> str:
        return Factory.given(path, json.dumps(arguments), label).digest

    first = digest(path="weights.pt")
    assert digest(path="weights.pt") == first
    found = {first, digest(), digest("another", path="weights.pt"), digest(path="gone.pt")}
    weights.write_bytes(b"2")
    found.add(digest(path="weights.pt"))
    weights.write_bytes(b"1")
    own.write_text(f"{source}\n# changed\n")
    found.add(digest(path="weights.pt"))
    assert len(found) == 6
    assert "ase" in Factory("ase.calculators.emt:EMT").versions
    assert list(Factory(path).versions) == ["own_calculator.py"]
