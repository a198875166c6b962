"""``--force`` replaces a data set of ours and deletes nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
from models import structures

from fairchem_kd.commands import main as cli

CONVERT = [
    "data",
    "convert",
    "frames.traj",
    "set",
    "--labels",
    "none",
    "--processes",
    "1",
    "--force",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with frames and the data set that was made of them."""
    root = tmp_path_factory.mktemp("made")
    ase.io.write(root / "frames.traj", structures(6, seed=0))
    before = Path.cwd()
    os.chdir(root)
    try:
        assert cli.main(CONVERT[:-1]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def everything(root: Path) -> dict[str, bytes | None]:
    files = [file for file in root.rglob("*") if file.name != ".set.lock"]  # of the command
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in files}


def note(path: str) -> Callable[[], None]:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("mine")

    return write


def only_notes() -> None:
    shutil.rmtree("set")
    for number in range(20):
        note(f"set/{number}.txt")()


def a_file() -> None:
    shutil.rmtree("set")
    note("set")()


def a_link() -> None:
    shutil.move("set", "elsewhere")
    Path("set").symlink_to("elsewhere")


def a_linked_split() -> None:
    shutil.move("set/train", "elsewhere")
    Path("set/train").symlink_to(Path("elsewhere").resolve())


def another_card() -> None:
    Path("set/card.json").write_text('{"name": "a card of something else"}')


def a_newer_card() -> None:
    text = Path("set/card.json").read_text()
    Path("set/card.json").write_text(text.replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (note("set/notes.txt"), "notes.txt"),
        (note("set/.hidden"), ".hidden"),
        (note("set/train/notes.txt"), "train/notes.txt"),
        (note("set/train/deep/notes.txt"), "train/deep"),
        (note("set/results/table.csv"), "results"),
        (only_notes, "no readable card.json"),
        (a_file, "is a file"),
        (a_link, "is a link"),
        (a_linked_split, "train"),
        (another_card, "no readable card.json"),
        (a_newer_card, "another version"),
    ],
)
@pytest.mark.parametrize(
    "command", [CONVERT, ["data", "slabs", "--dest", "set", "--train", "20", "--force"]]
)
def test_foreign_files_are_named_and_kept(
    command: list[str],
    change: Callable[[], None],
    named: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change()
    before = everything(home)
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: --force")
    assert named in said
    assert everything(home) == before


def test_a_data_set_and_an_empty_folder_are_replaced(home: Path) -> None:
    ase.io.write("frames.traj", structures(4, seed=1))
    note("set/train/data.0000.lmdb-lock")()
    assert cli.main(CONVERT) == 0
    assert '"frames": 4' in Path("set/card.json").read_text()
    shutil.rmtree("set")
    Path("set").mkdir()
    assert cli.main(CONVERT) == 0


def test_a_folder_in_the_way_of_a_conversion_is_kept(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(".set.converting/notes.txt")()
    assert cli.main(CONVERT) == 2
    assert "was not made by a conversion" in capsys.readouterr().err
    assert Path(".set.converting/notes.txt").read_text() == "mine"
