"""``fairchem-kd features``: the features of a forward, in files that anyone can read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from models import batch, structures
from trainings import inside, write_lmdb, write_teacher

from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.commands import main as cli
from fairchem_kd.features import FeatureExtractor, Request

REQUESTS = [
    Request("node", "node"),
    Request("edge", "node"),
    Request("vector@1", "vector"),
    Request("node@0+2", "node"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GemNet-OC, a file of slabs, and an LMDB of the same ones with names of text."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        for split in ("train", "val"):
            write_lmdb(Path("data") / split, 4, seed=3, sid=lambda _, i: f"slab-{i * 100}")
        write_teacher(Path("teacher"), Path("data")).rename("teacher.pt")
        ase.io.write("slabs.traj", structures(4, seed=3, std=0.15))
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(home)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, np.ndarray]:
    """The features of all slabs in one batch."""
    model = load_model(read_model(home / "teacher.pt"))
    tap = FeatureExtractor(model.model, REQUESTS)
    captured = model.forward(batch(structures(4, seed=3, std=0.15)), tap).features
    assert captured is not None
    return {request.address: captured[request].values.numpy() for request in REQUESTS}


def extract(out: str, source: str, *more: str) -> None:
    wanted = [word for request in REQUESTS for word in ("--feature", request.address)]
    argv = ["features", "teacher.pt", source, "--out", out, "--batch-size", "3", "--cpu"]
    assert cli.main([*argv, *wanted, *more]) == 0


@pytest.mark.parametrize("source", ["slabs.traj", "data/val", "data/val/data.0000.lmdb"])
def test_npz(source: str, expected: dict[str, np.ndarray]) -> None:
    extract("out.npz", source)
    with np.load("out.npz") as found:  # no pickles in it
        assert found["natoms"].tolist() == [13, 14, 13, 14]
        assert found["atomic_numbers"].shape == (54,)
        assert found["atomic_numbers"].dtype == np.int64
        assert set(found["atomic_numbers"]) == {1, 8, 29, 78}
        names = [0, 1, 2, 3] if source.endswith("traj") else [f"slab-{i}00" for i in range(4)]
        assert found["sid"].tolist()[1:] == names[1:]
        about = json.loads(str(found["about"]))
        for request in REQUESTS:
            values = found[request.address]
            assert values.dtype == np.float32
            tolerance = 2e-4 * np.abs(expected[request.address]).max()
            np.testing.assert_allclose(values, expected[request.address], atol=tolerance)
            assert about["features"][request.address]["channels"] == values.shape[-1]
            assert about["features"][request.address]["form"] == request.form
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_pooled(
    pool: str, expected: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    extract("pooled.npz", "slabs.traj", "--pool", pool, "--limit", "2")
    told = capsys.readouterr().err
    assert "(S, " in told
    assert "(N, " not in told
    with np.load("pooled.npz") as found:
        assert found["natoms"].tolist() == [13, 13]
        assert found["sid"].tolist() == [0, 2]
        for name, values in expected.items():
            combine = np.mean if pool == "mean" else np.sum
            rows = np.stack([combine(values[:13], axis=0), combine(values[27:40], axis=0)])
            np.testing.assert_allclose(found[name], rows, atol=1e-3 * np.abs(rows).max())


@pytest.mark.parametrize("pool", [(), ("--pool", "mean")])
def test_parquet(pool: tuple[str, ...], home: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    extract("out.parquet", "data/val", *pool)
    extract("same.npz", "data/val", *pool)
    table = parquet.read_table("out.parquet")
    about = json.loads(table.schema.metadata[b"fairchem_kd"])
    with np.load("same.npz") as found:
        rows = 4 if pool else 54
        assert table.num_rows == rows
        if pool:
            assert table["natoms"].to_pylist() == found["natoms"].tolist()
        else:
            assert table["atomic_number"].to_pylist() == found["atomic_numbers"].tolist()
            assert table["atom"].to_pylist()[12:15] == [12, 0, 1]
            assert table["structure"].to_pylist()[12:15] == [0, 1, 1]
        assert set(table["sid"].to_pylist()) == {f"slab-{i}00" for i in range(4)} - {"slab-000"} | {
            "slab-0"
        }
        for request in REQUESTS:
            values = np.array(table[request.address].to_pylist(), dtype=np.float32)
            np.testing.assert_array_equal(values, found[request.address].reshape(rows, -1))
    assert about["features"]["vector@1"]["form"] == "vector"


def test_parquet_without_pyarrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert cli.main(["features", "teacher.pt", "slabs.traj", "--out", "never.parquet"]) == 2
    assert "pip install 'fairchem-kd[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["teacher.pt", "slabs.traj", "--out", "a.csv"], "ends in .npz or .parquet"),
        (["nothing.pt", "slabs.traj", "--out", "a.npz"], "nothing.pt does not exist"),
        (["teacher.pt", "none.xyz", "--out", "a.npz"], "none.xyz does not exist"),
        (["teacher.pt", "teacher.pt", "--out", "a.npz"], "cannot be read by ASE"),
        (["teacher.pt", "slabs.traj", "--out", "a.npz", "--feature", "nod"], "no feature 'nod'"),
        (
            ["teacher.pt", "slabs.traj", "--out", "a.npz", "--limit", "0"],
            "--limit must be at least",
        ),
        (["teacher.pt", "strange.traj", "--out", "a.npz"], "holds Lr, which"),
        (
            ["teacher.pt", "nan.traj", "--out", "a.npz"],
            "nan.traj: structure 1 has positions that are not finite",
        ),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write("strange.traj", ase.Atoms("HLr", positions=[(0, 0, 0), (2, 0, 0)]))
    ase.io.write(
        "nan.traj", [ase.Atoms("H2", positions=[(0, 0, 0), (x, 0, 0)]) for x in (1, np.nan)]
    )
    assert cli.main(["features", *argv, "--cpu"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert re.search(sentence, text), text
    assert not Path("a.npz").exists()
