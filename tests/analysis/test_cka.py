"""``fairchem-kd cka``: layers, maps, marks, what is written, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from models import batch, small_model, structures
from test_similarity import dense_cka
from trainings import config, inside, trainer, write_home

from fairchem_kd.analysis.cka.layers import Mark, distilled_pairs, layers_of, settle
from fairchem_kd.analysis.cka.study import STUDENT, TEACHER, similarities
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.commands import main as cli
from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request

SIZES = {"train": 8, "val": 4, "test": 10}
LOSSES = {"e2n": {}, "early": {"kind": "n2n", "student": "node@1", "teacher": "node@1"}, "v2v": {}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data, a teacher, a distilled student and one that was not trained."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home(SIZES)
        run = config(
            Path("."), Path("data"), losses=LOSSES, teacher=Path("teacher.pt"), max_epochs=1
        )
        with trainer(run, identifier="distilled") as built:
            built.train(disable_eval_tqdm=True)
        with trainer(config(Path("."), Path("data")), identifier="plain", seed=5) as built:
            Path(built.save(checkpoint_file="plain.pt", training_state=False)).rename("plain.pt")
        with trainer(config(Path("."), Path("data"), model="schnet"), identifier="x") as built:
            Path(built.save(checkpoint_file="schnet.pt", training_state=False)).rename("schnet.pt")
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(home)
    yield
    torch.set_flush_denormal(False)


def distilled() -> str:
    [folder] = Path("checkpoints").glob("*-distilled")
    return str(folder)


def test_layers_from_the_input_on_each_once() -> None:
    assert layers_of(small_model("painn")) == {
        "node": ["node@0", "node@1", "node@2", "node@3"],
        "vector": ["vector@1", "vector@2", "vector@3"],
    }
    assert layers_of(small_model("gemnet_oc")) == {
        "node": ["node@0", "node@1", "node@2", "edge@0", "edge@1", "edge@2", "node", "edge"],
        "vector": ["vector@0", "vector@1", "vector@2", "vector"],
    }
    assert layers_of(small_model("schnet"))["vector"] == []
    chosen = layers_of(small_model("painn"), ["message_*", "node@1+3", "edge@2", "node", "node@3"])
    assert chosen == {
        "node": [
            "message_node@1",
            "message_node@2",
            "message_node@3",
            "node@1+3",
            "edge@2",
            "node",
        ],
        "vector": ["message_vector@1", "message_vector@2", "message_vector@3"],
    }
    with pytest.raises(
        UserError, match=r"no layer of PaiNN is called 'nodes@\*'; it offers: node,"
    ):
        layers_of(small_model("painn"), ["nodes@*"])
    with pytest.raises(UserError, match="PaiNN has no feature 'node@9'"):
        layers_of(small_model("painn"), ["node@9"])


def test_marks_are_found_in_the_config_and_named_as_the_layers_are() -> None:
    marks = distilled_pairs(read_model(distilled()))
    assert marks == [
        Mark("e2n", "node", "node", "edge"),
        Mark("early", "node", "node@1", "node@1"),
        Mark("v2v", "vector", "vector", "vector"),
    ]
    assert distilled_pairs(read_model("plain.pt")) == []
    student, teacher = small_model("painn"), small_model("gemnet_oc")
    layers = layers_of(student), layers_of(teacher)
    named = [settle(mark, student, teacher, layers) for mark in marks]
    assert [(m.student, m.teacher) for m in named] == [
        ("node@3", "edge"),
        ("node@1", "node@1"),
        ("vector@3", "vector"),
    ]
    added = settle(Mark("x", "vector", "message_vector@2", "edge@1"), student, teacher, layers)
    assert (added.student, added.teacher) == ("message_vector@2", "vector@1")
    assert layers[0]["vector"][-1] == "message_vector@2"


def test_values_are_those_of_the_features(home: Path) -> None:
    """Every entry against the dense reference on features of the whole data set at once."""
    models = {
        TEACHER: load_model(read_model("teacher.pt")),
        STUDENT: load_model(read_model("plain.pt")),
    }
    layers = {role: layers_of(model.model) for role, model in models.items()}
    with open_structures("data/test") as opened:
        found = similarities(models, opened, layers, names={r: r for r in models}, batch_size=3)
        [whole] = opened.batches(100)
    assert found.compared.structures == 10
    assert found.compared.atoms == len(whole.pos)
    values = {}
    for role, model in models.items():
        tap = FeatureExtractor(
            model.model, [Request(a, form) for form, own in layers[role].items() for a in own]
        )
        captured = model.forward(whole, tap).features
        values[role] = {request: captured[request].values for request in tap.specs}
    assert [m.form for m in found.compared.maps] == ["node", "vector"]
    for shown in found.compared.maps:
        for row in shown.rows:
            for column in shown.columns:
                x, y = values[TEACHER][row, shown.form], values[STUDENT][column, shown.form]
                expected = dense_cka(shown.form, x, y)
                assert shown.at(row, column).value == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert np.isfinite(shown.errors[np.isfinite(shown.values)]).all()


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher, marks and data are found in the run itself."""
    argv = ["cka", "--student", distilled(), "--before", "plain.pt", "--cpu", "--batch-size", "3"]
    assert cli.main([*argv, "--out", "out"]) == 0
    text = capsys.readouterr().out
    assert "CKA at the distilled layers (distilled)" in text
    assert "CKA of teacher (rows) and distilled (columns), vector form" in text
    assert re.search(r"\ne2n +edge +node@3\* +-?0\.\d{3} ± 0\.\d{3} ", text)
    assert re.search(r"\nearly +node@1 +node@2 ", text)  # what follows a distilled layer
    results = json.loads(Path("out/cka.json").read_text())
    assert [(m["form"], m["rows_of"], m["columns_of"]) for m in results["maps"]] == [
        (form, *pair)
        for form in ("node", "vector")
        for pair in (("teacher", "student"), ("teacher", "before"), ("before", "student"))
    ]
    assert results["structures"] == 10
    row = next(r for r in results["distilled"] if r["loss"] == "early" and r["is_distilled"])
    after, before = results["maps"][0], results["maps"][1]
    i, j = after["rows"].index("node@1"), after["columns"].index("node@1")
    assert row["after"]["value"] == after["cka"][i][j]
    assert row["before"]["value"] == before["cka"][i][j]
    assert row["difference"]["value"] == pytest.approx(after["cka"][i][j] - before["cka"][i][j])
    own = results["maps"][2]
    assert own["rows"] == own["columns"]
    assert Path("out/cka.md").read_text().startswith("### CKA at the distilled layers")
    for name in ("cka_node", "cka_vector", "cka_node_student"):
        assert Path(f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "linear CKA (unbiased)" in Path(f"out/{name}.svg").read_text()
    drawn = Path("out/cka_node.svg").read_text()
    assert "framed: compared by the loss" in drawn
    assert "difference" in drawn


def test_a_model_with_itself_on_a_file_of_ase(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slabs.traj"
    ase.io.write(file, [slab for seed in range(3) for slab in structures(4, seed=seed)])
    argv = ["cka", "--teacher", "plain.pt", "--student", "plain.pt", "--data", str(file), "--json"]
    argv += ["--cpu", "--pair", "vector:vector@2", "--samples", "9", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    text = (tmp_path / "cka.md").read_text()  # nothing was distilled, so nothing says so
    assert text.startswith("### CKA at the marked layers (plain (student))")
    assert "framed: chosen to be marked" in (tmp_path / "cka_vector.svg").read_text()
    assert "distill" not in text
    results = json.loads(capsys.readouterr().out)
    assert results["structures"] == 9
    assert results["models"]["student"]["name"] == "plain (student)"
    for shown in results["maps"]:
        np.testing.assert_allclose(np.diag(np.array(shown["cka"], dtype=float)), 1.0, atol=1e-9)
    [row] = results["distilled"]
    assert (row["student"], row["teacher"]) == ("vector@3", "vector@2")
    assert (row["is_marked"], row["is_distilled"]) == (True, False)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--student", "plain.pt"], "was not distilled from a teacher: name one with --teacher"),
        (["--student", "nothing.pt"], "nothing.pt does not exist"),
        (["--student", "DISTILLED", "--student-layers", "nod*x"], "no layer of PaiNN is called"),
        (["--student", "DISTILLED", "--teacher-layers", "node@7"], "no feature 'node@7'"),
        (["--student", "DISTILLED", "--before", "schnet.pt"], "has not the layers of"),
        (["--student", "DISTILLED", "--data", "data/none"], "data/none does not exist"),
        (
            ["--student", "DISTILLED", "--data", "data"],
            r"has no \*\.lmdb file and no file that ASE",
        ),
        (["--student", "DISTILLED", "--data", "teacher.pt"], "cannot be read by ASE"),
        (["--student", "DISTILLED", "--pair", "node"], "does not read STUDENT:TEACHER"),
        (["--student", "DISTILLED", "--pair", "node:vector"], "cannot be had as a node feature"),
        (["--student", "DISTILLED", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [distilled() if word == "DISTILLED" else word for word in argv]
    assert cli.main(["cka", *argv, "--cpu"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert re.search(sentence, text), text


def test_structures_of_either_source(home: Path, tmp_path: Path) -> None:
    """Evenly spread, each with its place; what is not periodic gets room."""
    with open_structures("data/test", limit=4) as opened:
        [part] = opened.batches(10)
        assert opened.count == 4
        assert [place for place, _ in opened.numbered()] == [0, 2, 5, 7]
    assert part.sid.tolist() == [0, 2, 5, 7]
    slabs = structures(4)
    slabs[1].pbc = (True, True, False)
    molecule = ase.Atoms("H2O", positions=[(0, 0, 0), (0.9, 0, 0.3), (-0.9, 0, 0.3)])
    ase.io.write(tmp_path / "a.traj", [*slabs, molecule])
    with open_structures(tmp_path / "a.traj", limit=2) as opened:
        assert [(place, one.sid) for place, one in opened.numbered()] == [(0, 0), (2, 2)]
    with open_structures(tmp_path / "a.traj") as opened:
        [mixed] = opened.batches(10)
        assert opened.count is None
    expected = batch(slabs)
    count = len(expected.pos)
    assert mixed.natoms.tolist() == [*expected.natoms.tolist(), 3]
    assert torch.equal(mixed.atomic_numbers[:count].long(), expected.atomic_numbers.long())
    assert torch.equal(mixed.tags[:count].long(), expected.tags)
    assert torch.equal(mixed.fixed[:count].long(), expected.fixed.long())
    assert mixed.pbc.all()
    assert mixed.cell[1, 2, 2] > 40
    assert (mixed.cell[4].diagonal() >= 40).all()
    # the same energies as without room, since no image was in reach before either
    teacher = load_model(read_model("teacher.pt"))
    energies = teacher.forward(mixed).raw["energy"][:4]
    torch.testing.assert_close(
        energies, teacher.forward(expected).raw["energy"], rtol=1e-4, atol=1e-4
    )
    Path(tmp_path / "empty.extxyz").touch()
    with open_structures(tmp_path / "empty.extxyz") as opened, pytest.raises(UserError):
        list(opened.batches(2))
