"""The file of structures, and the python file that is made of modules."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_one_file

from fairchem_kd.calculators.bundle import MODULES, bundled
from fairchem_kd.calculators.filling import Item
from fairchem_kd.calculators.options import parse_part
from fairchem_kd.calculators.structures_file import StructuresFile, write_structures
from fairchem_kd.errors import UserError
from fairchem_kd.machine import PRECISIONS
from fairchem_kd.store import Structure
from fairchem_kd.store.card import COMPUTED


def items(number: int = 5) -> list[Item]:
    draw = np.random.default_rng(0)
    made = []
    for place in range(number):
        atoms = 2 + place % 3
        structure = Structure(
            draw.integers(1, 90, atoms),
            draw.normal(size=(atoms, 3)),
            np.eye(3) * 9 + draw.normal(size=(3, 3)),
            None if place == 1 else np.array([True, False, True]),
            None if place == 2 else draw.integers(0, 3, atoms),
        )
        made.append(Item("first" if place < 3 else "second", place, structure))
    return made


def test_structures_come_back_as_they_were_each_once(tmp_path: Path) -> None:
    path = tmp_path / "wanted.npz"
    made = items()
    assert write_structures(path, [*made, made[2]]) == 5
    read = list(StructuresFile(path).items())
    assert [one.structure.key() for one in read] == [one.structure.key() for one in made]
    assert [(one.source, one.number) for one in read] == [(m.source, m.number) for m in made]
    parts = [one for part in (0, 1, 2) for one in StructuresFile(path).items(part, 3)]
    assert sorted(one.number for one in parts) == [0, 1, 2, 3, 4]
    assert write_structures(tmp_path / "none.npz", []) == 0
    assert len(StructuresFile(tmp_path / "none.npz")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none.npz", "wanted.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": np.array(7)}, "has format 7"),
        ({"format": None}, "has no array 'format'"),
        ({"natoms": np.array([1, 2], "<u4")}, "has the shape"),
        ({"natoms": np.array([2.0])}, "'natoms' is float64"),
        ({"pos": np.zeros((3, 3), "<f4")}, "'pos' has the shape"),
        ({"pos": np.full((14, 3), np.nan, "<f4")}, "'pos' is not finite"),
        ({"cell": np.full((5, 3, 3), np.inf, "<f4")}, "'cell' is not finite"),
        ({"numbers": np.zeros(14, "<u1")}, "atoms without an element"),
        ({"source": np.full(5, 9, "<u4")}, "names sources that it has not"),
        ({"sources": np.array([object()], object)}, "of objects, which are pickles"),
    ],
)
def test_files_that_lie(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "wanted.npz"
    write_structures(path, items())
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files} | change
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=message):
        StructuresFile(path)


def test_what_is_no_file_of_structures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        StructuresFile(tmp_path / "gone.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UserError, match="no archive of numpy's"):
        StructuresFile(tmp_path / "text.npz")
    with pytest.raises(UserError, match="it is a folder"):
        StructuresFile(tmp_path)


@pytest.mark.parametrize("given", ["4/3", "0/3", "1", "1/", "-1/3", "1/0", "a/b", "1.0/2"])
def test_parts_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match="must read I/N"):
        parse_part(given)


def test_the_modules_of_the_written_file_need_nothing_else() -> None:
    """No name stands at the top of two of them, and each comes after those that it imports."""
    assert_one_file(MODULES)


def test_the_written_file_imports_numpy_ase_and_the_standard_library() -> None:
    tree = ast.parse(bundled("writer.py"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    import sys

    assert found - set(sys.stdlib_module_names) == {"numpy", "ase"}


def test_a_card_knows_every_precision() -> None:
    assert set(PRECISIONS) < set(COMPUTED)
