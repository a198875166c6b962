"""``fairchem-kd data pool``: several splits as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trainings import write_lmdb

from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.commands import main as cli


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two splits of a data set."""
    monkeypatch.chdir(tmp_path)
    write_lmdb(Path("data/train"), 5, seed=0)
    write_lmdb(Path("more/train"), 3, seed=50)
    return tmp_path


def positions(folder: str) -> list[np.ndarray]:
    with open_structures(folder) as opened:
        return [np.asarray(sample.pos) for sample in opened.samples()]


def test_structures_come_in_the_order_of_the_splits(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "pool", "data/train", "more/train", "pool/train"]) == 0
    assert "8 structures (5 of data/train, 3 of more/train)" in capsys.readouterr().out
    found = positions("pool/train")
    expected = positions("data/train") + positions("more/train")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    with np.load("pool/train/metadata.npz") as index:
        assert index["natoms"].tolist() == [len(one) for one in expected]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data/train", "data/../data/train", "new"], "data/../data/train is given twice"),
        (["data/train", "missing", "new"], "missing does not exist in"),
        (["data", "more/train", "new"], "data has no LMDB: name one of its splits (train)"),
        (["data/train", "more/train"], "DEST more/train is there already"),
        (["data/train", "short", "new"], "the index"),
        (["data/train", "more/train", "file/new"], "DEST file/new cannot be written"),
    ],
)
def test_refusals(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    write_lmdb(Path("short"), 2, seed=60)
    np.savez("short/metadata.npz", natoms=np.array([13]))
    Path("file").touch()
    assert cli.main(["data", "pool", *words]) == 2
    assert told in capsys.readouterr().err
    assert not Path("new").exists()
