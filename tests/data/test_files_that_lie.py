"""Data whose files say something else than they are: one sentence, by every command that reads."""

from __future__ import annotations

import pickle
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import attacks
import lmdb
import numpy as np
import pytest
from models import structures
from trainings import config, write_splits, write_teacher, write_yaml

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.reading import read_json


class Canary:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 6 and 4 structures, and a model that was trained on them."""
    root = tmp_path_factory.mktemp("home")
    write_splits(root / "data", train=(6, 0), val=(4, 50))
    shutil.copy(write_teacher(root, root / "data", "painn"), root / "model.pt")
    arguments = config(Path(), Path("data"))
    arguments["dataset"]["train"]["src"] = "evil"
    del arguments["dataset"]["train"]["transforms"]
    write_yaml(root / "run.yml", arguments)
    return root


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """A copy of it, whose ``evil`` is the set of 4."""
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(home / "data" / "val", tmp_path / "evil")
    for name in ("model.pt", "run.yml"):
        shutil.copy(home / name, tmp_path / name)
    return tmp_path


COMPARE = ["compare", "model.pt", "--split", "evil", "--cpu", "--no-plots"]
FEATURES = ["features", "model.pt", "evil", "--out", "f.npz", "--cpu"]
TRAIN = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu"]


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "metadata.npz", **arrays)


def claiming(shape: str) -> Callable[[Path], None]:
    """An array of four numbers whose header says another shape."""

    def write(folder: Path) -> None:
        file = folder / "metadata.npz"
        np.savez(file, natoms=np.arange(1, 5))
        with zipfile.ZipFile(file) as archive:
            contents = archive.read("natoms.npy")
        with zipfile.ZipFile(file, "w") as archive:
            old, new = b"(4,), }", f"{shape}, }}".encode()
            changed = contents.replace(old + b" " * (len(new) - len(old)), new)
            assert changed != contents
            archive.writestr("natoms.npy", changed)

    return write


def flipped(folder: Path) -> None:
    file = folder / "metadata.npz"
    contents = bytearray(file.read_bytes())
    contents[contents.index(b"NUMPY") + 140] ^= 1
    file.write_bytes(contents)


def length(value: Any) -> Callable[[Path], None]:
    """The number of samples that an LMDB says it has."""

    def write(folder: Path) -> None:
        env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, lock=False)
        with env.begin(write=True) as transaction:
            transaction.put(b"length", pickle.dumps(value))
        env.close()

    return write


INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no archive": (lambda folder: (folder / "metadata.npz").write_text("x"), "no archive"),
    "empty": (lambda folder: (folder / "metadata.npz").write_bytes(b""), "no archive"),
    "cut off": (
        lambda folder: (folder / "metadata.npz").write_bytes(
            (folder / "metadata.npz").read_bytes()[:90]
        ),
        "no archive",
    ),
    "a flipped bit": (flipped, "damaged"),
    "objects": (npz(natoms=np.array([Canary()] * 4, dtype=object)), "pickles and could run code"),
    "objects beside": (npz(natoms=[1] * 4, more=np.array([Canary()] * 4)), "'more.npy' is of obj"),
    "no natoms": (npz(sizes=[1, 2, 3, 4]), "no array 'natoms'"),
    "too few": (npz(natoms=[3, 3]), "of 2 samples, and there are 4"),
    "too many": (npz(natoms=[3] * 5), "of 5 samples, and there are 4"),
    "unlike": (npz(natoms=[3] * 4, sid=[1]), "'sid' has the shape (1,)"),
    "text": (npz(natoms=["a"] * 4), "one whole number"),
    "fractions": (npz(natoms=[1.5] * 4), "one whole number"),
    "a table": (npz(natoms=[[3]] * 4), "one whole number"),
    "a number": (npz(natoms=3), "one whole number"),
    "negative": (npz(natoms=[3, -3, 3, 3]), "sample 1 has -3 atoms"),
    "a huge claim": (claiming("(999999999999,)"), "claims the shape"),
    "a small claim": (claiming("(3,)"), "claims the shape"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_not_of_its_samples(place: Path, name: str) -> None:
    write, words = INDEXES[name]
    write(place / "evil")
    attacks.run(FEATURES, place).sentence("evil/metadata.npz", words, "remove the index")
    assert not (place / "canary").exists()


@pytest.mark.parametrize("name", ["objects", "too few"])
def test_a_training_and_other_commands_refuse_it_too(place: Path, name: str) -> None:
    write, words = INDEXES[name]
    write(place / "evil")
    attacks.run(COMPARE, place).sentence("evil/metadata.npz", words)
    attacks.run(TRAIN, place, fairchem).sentence("dataset.train.src", "metadata.npz", words)
    assert not (place / "canary").exists()


def test_data_without_an_index_and_with_a_good_one_are_read(place: Path) -> None:
    attacks.run(COMPARE, place).went_on()
    (place / "evil" / "metadata.npz").unlink()
    attacks.run(COMPARE, place).went_on()


@pytest.mark.parametrize("claimed", [5, 10**12, -1])
def test_an_lmdb_that_says_that_it_has_more(place: Path, claimed: int) -> None:
    length(claimed)(place / "evil")
    (place / "evil" / "metadata.npz").unlink()
    attacks.run(FEATURES, place).sentence("data.0000.lmdb", f"says that it has {claimed:,} samples")


# -- files of ASE's -------------------------------------------------------------------------------


def text(contents: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(contents)


def database(file: Path) -> None:
    with ase.db.connect(str(file)) as rows:
        for atoms in structures(4):
            rows.write(atoms)


def truncated(file: Path) -> None:
    database(file)
    file.write_bytes(file.read_bytes()[:5000])


def spoiled(file: Path) -> None:
    database(file)
    contents = bytearray(file.read_bytes())
    contents[100:4096] = b"\xff" * 3996
    file.write_bytes(contents)


def other_tables(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE people (name TEXT)")


def an_lmdb(file: Path) -> None:
    env = lmdb.open(str(file), subdir=False, lock=False)
    env.close()


XYZ = "2\nProperties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 1\n"
FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "atoms without end": ("a.extxyz", text(XYZ.replace("2", "99999999999", 1)), "99,999,999,999"),
    "in a later frame": ("a.extxyz", text(XYZ + XYZ.replace("2", "9999999", 1)), "in frame 1"),
    "atoms below none": ("a.xyz", text("-2\n\n"), "begins with '-2'"),
    "no xyz": ("a.xyz", text("hello\n"), "begins with 'hello'"),
    "digits without end": ("a.xyz", text("9" * 5000 + "\n"), "is not extended xyz"),
    "no database": ("a.db", text("hello, this is no database"), "a.db"),
    "an LMDB": ("a.db", an_lmdb, "LMDB"),
    "a database cut off": ("a.db", truncated, "a.db"),
    "a spoiled database": ("a.db", spoiled, "a.db"),
    "another database": ("a.db", other_tables, "a.db"),
    "no trajectory": ("a.traj", text("hello"), "a.traj"),
    "a trajectory cut off": (
        "a.traj",
        lambda file: (
            ase.io.write(file, structures(4)), file.write_bytes(file.read_bytes()[:900])
        ),
        "a.traj",
    ),
    "no structure": ("a.cif", text("hello"), "a.cif"),
    "POSCAR of many": (
        "POSCAR",
        text("H\n1\n1 0 0\n0 1 0\n0 0 1\nH\n99999999999\nDirect\n0 0 0\n"),
        "POSCAR",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_or_size(place: Path, name: str) -> None:
    file, write, words = FILES[name]
    write(place / file)
    argv = ["data", "convert", file, "made", "--labels", "none", "--processes", "1"]
    attacks.run(argv, place).sentence(words)
    attacks.run(["features", "model.pt", file, "--out", "f.npz", "--cpu"], place).sentence(words)
    assert not (place / "made").exists()


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        *(("ase_db", name) for name in FILES if FILES[name][0] == "a.db"),
        ("ase_read", "atoms without end"),
        ("ase_read_multi", "atoms without end"),
        ("ase_read", "no xyz"),
        ("ase_read", "no structure"),
        ("ase_read_multi", "no structure"),
    ],
)
def test_a_training_on_it(place: Path, format_: str, name: str) -> None:
    file, write, _ = FILES[name]
    shutil.rmtree(place / "evil")
    (place / "evil").mkdir()
    write(place / "evil" / file)
    source = f"evil/{file}" if format_ == "ase_db" else "evil"
    arguments = [f"--dataset.train.format={format_}", f"--dataset.train.src={source}"]
    attacks.run([*TRAIN, *arguments], place, fairchem).sentence("dataset.train")


def test_good_files_are_read(place: Path) -> None:
    (place / "a.extxyz").write_text(XYZ + "\n" + XYZ)
    database(place / "a.db")
    ase.io.write(place / "a.traj", structures(4))
    for file, count in (("a.extxyz", 2), ("a.db", 4), ("a.traj", 4)):
        argv = ["data", "convert", file, f"made_{file}", "--labels", "none", "--processes", "1"]
        attacks.run(argv, place).went_on()
        assert read_json(place / f"made_{file}" / "card.json")["splits"]["train"]["frames"] == count
