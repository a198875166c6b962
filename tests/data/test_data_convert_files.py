"""People's files as they come: blank lines between frames, and constraints of every kind."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import lmdb
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixScaled,
    Hookean,
)
from models import structures
from published import read

from fairchem_kd.commands import main as cli
from fairchem_kd.data.convert import sources
from fairchem_kd.data.convert.sources import find_files, parts_of, passed_over, read_part
from fairchem_kd.errors import UserError

ALL = (True, True, True)


def convert(source: Path, dest: Path) -> int:
    return cli.main(
        ["data", "convert", str(source), str(dest), "--labels", "none", "--processes", "1"]
    )


def samples(dest: Path) -> list[Any]:
    return read(dest / "train")


def texts(count: int) -> list[str]:
    found = []
    slabs = [atoms for seed in range(3) for atoms in structures(4, seed=seed)]
    for atoms in slabs[:count]:
        atoms.info.clear()
        text = io.StringIO()
        ase.io.write(text, atoms, format="extxyz")
        found.append(text.getvalue())
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "blank",
    [
        lambda frames: "\n".join(frames),
        lambda frames: "\n \n" + "".join(frames),
        lambda frames: "".join(frames) + "\n\n\t\n",
        lambda frames: "".join(frames[:3]) + "\n\n" + "".join(frames[3:]),
        lambda frames: "\r\n".join(frames),
    ],
    ids=["between", "before", "after", "in the middle", "of Windows"],
)
def test_blank_lines_lose_no_frame(
    blank: Any, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FRAMES_PER_PART", 4)  # several parts, entered at offsets
    frames = texts(10)
    data = blank(frames).encode()
    source = tmp_path / ("a.xyz.gz" if packed else "a.xyz")
    source.write_bytes(gzip.compress(data) if packed else data)
    assert convert(source, tmp_path / "set") == 0
    found = [sample.pos.numpy() for sample in samples(tmp_path / "set")]
    expected = [ase.io.read(io.StringIO(text), format="extxyz").positions for text in frames]
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_text_after_the_last_frame_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.xyz").write_text("".join(texts(3)) + "\n\nthe end\n")
    assert convert(tmp_path / "a.xyz", tmp_path / "set") == 2
    assert "frame 3 begins with 'the end'" in capsys.readouterr().err


def slab(*constraints: Any) -> Atoms:
    atoms = structures(1)[0]
    atoms.info.clear()
    atoms.set_constraint(list(constraints))
    return atoms


@pytest.mark.parametrize(
    ("constraints", "fixed", "noted"),
    [
        ([FixAtoms([0, 2])], [0, 2], False),
        ([FixCartesian([0, 1], ALL)], [0, 1], False),
        ([FixScaled([1], ALL)], [1], False),
        ([FixCartesian([0, 1], (True, True, False)), FixCartesian([1], ALL)], [1], True),
        ([FixCartesian([0], (True, False, False)), FixedLine([0], (1, 0, 0))], [0], False),
        ([FixCartesian([0, 1, 2], (False, False, True))], [], True),
        ([FixScaled([0], (False, True, False))], [], True),
        ([FixedPlane([0, 1], (0, 0, 1))], [], True),
        ([FixedLine([0, 1], (0, 0, 1))], [], True),
        ([FixBondLengths([[0, 1]])], [], True),
        ([Hookean(0, 1, rt=2.7, k=5)], [], True),
        ([FixCom()], [], True),
        ([FixAtoms([3]), Hookean(0, 1, rt=2.7, k=5)], [3], True),
        ([], [], False),
    ],
)
def test_fixed_are_atoms_that_are_held_in_all_directions(
    constraints: list[Any],
    fixed: list[int],
    noted: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ase.io.write(tmp_path / "a.traj", slab(*constraints))
    assert convert(tmp_path / "a.traj", tmp_path / "set") == 0
    (sample,) = samples(tmp_path / "set")
    assert sample.fixed.nonzero().flatten().tolist() == fixed
    notes = json.loads((tmp_path / "set" / "card.json").read_text())["notes"]
    assert any("constraints" in note for note in notes) == noted
    assert ("1 frames have constraints" in "".join(capsys.readouterr())) == noted


@pytest.mark.parametrize(
    ("constraint", "fixed"),
    [
        (FixAtoms([0, 2]), [0, 2]),
        (FixCartesian([0, 1], (False, False, True)), []),
        (FixCartesian([0, 1], ALL), [0, 1]),
    ],
)
def test_a_move_mask_of_extended_xyz(constraint: Any, fixed: list[int], tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", slab(constraint))
    assert convert(tmp_path / "a.extxyz", tmp_path / "set") == 0
    (sample,) = samples(tmp_path / "set")
    assert sample.fixed.nonzero().flatten().tolist() == fixed


def test_every_file_below_a_folder_is_read_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind links too, compressed ones of VASP, and those of several runs."""
    vasp = ["a/OUTCAR", "a/OUTCAR.1", "b/OUTCAR.gz", "b/vasprun.xml.bz2", "b/vasprun.xml.relax"]
    vasp.append("c/OUTCAR_relax2.xz")
    for name in (*vasp, "c/INCAR", "c/notes.txt", "c/run.traj"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.extxyz").touch()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "back").symlink_to(tmp_path / "runs")
    found = find_files([tmp_path / "runs"])
    names = [str(file.relative_to(tmp_path / "runs")) for file in found]
    assert names == [*vasp, "c/run.traj", "linked/d.extxyz"]
    left = passed_over([tmp_path / "runs"], found)
    assert [file.name for file in left] == ["INCAR", "notes.txt"]


def test_labels_in_the_data_of_an_ase_database(tmp_path: Path) -> None:
    atoms = molecule("CO")
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(atoms, data={"energy": -3.5, "forces": [[0, 0, 1.0], [0, 0, -1.0]]})
    (part,) = parts_of(tmp_path / "a.db", 0, "train")
    (structure,) = read_part(part)
    assert structure.atoms.info["energy"] == -3.5
    assert structure.atoms.arrays["forces"].tolist() == [[0, 0, 1.0], [0, 0, -1.0]]


def test_an_lmdb_that_is_called_db_is_refused(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path / "a.db"), subdir=False, lock=False).close()
    with pytest.raises(UserError, match="is an LMDB and no database of ASE's"):
        parts_of(tmp_path / "a.db", 0, "train")
