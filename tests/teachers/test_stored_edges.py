"""Features of edges in a store: kept with their edges, read for any batch, never mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import assert_equal, config, trainer, weights, write_lmdb
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.features import GRAPH, Request
from fairchem_kd.losses import match_edges
from fairchem_kd.store import Column, Reader, Structure, Writer
from fairchem_kd.teachers import Taught, filling
from fairchem_kd.teachers.answers import (
    EDGES,
    by_structure,
    columns_of,
    fits,
    joined,
    structures_of,
)
from fairchem_kd.teachers.contents import check_records, contents
from fairchem_kd.teachers.drift import difference
from fairchem_kd.teachers.place import FOLDER
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import MISSING, StoredTeacher, join_said

EDGE = Request("edge", "edge")
LOSSES: dict[str, Any] = {"e2e": {}, "n2n": {}}


def arguments(root: Path, data: Path, teacher: Path, **distillation: Any) -> dict[str, Any]:
    own = {"checkpoint": str(teacher), **distillation.pop("own", {})}
    block = {"teacher": own, "losses": LOSSES, **distillation}
    return config(root, data, distillation=block, max_epochs=1)


def trained(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=2e-3, atol=2e-5, msg=name)


def store_in(root: Path) -> Path:
    (folder,) = (root / FOLDER).iterdir()
    return folder


def test_a_training_from_a_store_is_the_live_one(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies and unlabelled structures, and with a store that lacks some."""
    more = write_lmdb(tmp_path / "more", 6, seed=90)
    companions = {
        "rattle": {"copies": 0.5, "pool": 2},
        "unlabelled": {"dataset": {"format": "lmdb", "src": str(more)}},
    }
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}, **companions))
    assert_near(trained(arguments(tmp_path, data, teacher, **companions)), live)
    monkeypatch.setattr(filling, "GROUP", 3)
    few = {"store": str(tmp_path / "few"), "max_gb": 2.5e-4}
    assert_near(trained(arguments(tmp_path, data, teacher, own=few, **companions)), live)
    assert 0 < len(Reader(tmp_path / "few")) < len(Reader(store_in(tmp_path)))


def test_what_is_read_is_what_the_teacher_says_edge_by_edge(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with trainer(arguments(tmp_path, data, teacher)) as built:
        built.set_up()
        stored, requests = built.distillation.teacher, built.distillation.teacher_requests
        assert isinstance(stored, StoredTeacher)
        assert GRAPH in requests
        for indices in ([0], [3, 1, 2], [5, 5, 10]):
            batch = built.collater([built.train_dataset[i] for i in indices])
            said, live = stored.teach(batch, requests), stored.live.teach(batch, requests)
            compare(said, live, len(batch.pos))
            # read apart and joined, as companions are
            parts = [built.collater([built.train_dataset[i]]) for i in indices]
            joint = join_said([(part.said, part) for part in parts])
            for name, values in batch.said.items():
                assert name == MISSING or torch.equal(joint[name], values)
            # some of them missing
            records = joined_with_a_gap(stored, batch)
            batch.said = records
            compare(stored.teach(batch, requests), live, len(batch.pos))
            compare(live.of([len(indices) - 1, 0]), again(stored, built, indices), None)
        text = contents(stored.folder)
        assert "feature:graph:edge           (E, 5) <i4" in text
        assert "feature:edge:edge            (E, 20) <f4" in text
    assert check_records(store_in(tmp_path)) == (11, 0)


def compare(said: Taught, live: Taught, atoms: int | None) -> None:
    """The same edges with the same features, in whatever order."""
    atoms = int(said.natoms.sum()) if atoms is None else atoms
    place, matched = match_edges(said.features[GRAPH], live.features[GRAPH], atoms)
    assert matched.all()
    assert len(said.features[GRAPH]) == len(live.features[GRAPH])
    torch.testing.assert_close(
        said.features[EDGE], live.features[EDGE][place], rtol=1e-3, atol=1e-4
    )


def joined_with_a_gap(stored: StoredTeacher, batch: Any) -> dict[str, Any]:
    """What is read of a batch of which the store lacks the first structure."""
    read, natoms = stored.reader.read, batch.natoms.tolist()
    lacking = iter([True] + [False] * len(natoms))
    stored.reader.read = lambda *a: None if next(lacking) else read(*a)  # type: ignore[method-assign]
    said = stored.said(batch)
    stored.reader.read = read  # type: ignore[method-assign]
    assert said[MISSING] == [0]
    return said


def again(stored: StoredTeacher, built: Any, indices: list[int]) -> Taught:
    """The answers to the last and the first of the structures alone."""
    batch = built.collater([built.train_dataset[i] for i in (indices[-1], indices[0])])
    return stored.live.teach(batch, stored.requests)


def test_the_line_about_the_size_says_what_edges_take(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("fairchem_kd.distillation.keeping._say", lines.append)
    trained(arguments(tmp_path, data, teacher))
    (line,) = [line for line in lines if "Keeping" in line]
    said, edges, per_atom = (float(word) for word in _numbers(line))
    whole = sum(path.stat().st_size for path in store_in(tmp_path).rglob("*.data")) / 1e6
    assert said == pytest.approx(whole, rel=0.3)
    assert 0.5 * said < edges <= said
    assert 10 < per_atom < 20


def _numbers(line: str) -> tuple[str, str, str]:
    words = line.split(": about ")[1]
    return words.split(" MB")[0], words.split(", ")[1].split(" ")[0], words.split("(")[1].split()[0]


def test_edges_that_lie_are_asked_for_again(tmp_path: Path, data: Path, teacher: Path) -> None:
    given = arguments(tmp_path, data, teacher)
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}))
    trained(given)
    index = next(store_in(tmp_path).glob("shards/*.index"))
    spoiled = bytearray(index.read_bytes())
    spoiled[36] ^= 1  # the first record's number of edges
    index.write_bytes(spoiled)
    assert check_records(store_in(tmp_path)) == (10, 1)
    assert_near(trained(given), live)


def test_a_store_alone_teaches_edges(tmp_path: Path, data: Path, teacher: Path) -> None:
    store = {"store": str(tmp_path / "store")}
    expected = trained(arguments(tmp_path, data, teacher, own=store))
    alone = arguments(tmp_path, data, teacher)
    alone["task"]["distillation"]["teacher"] = store
    with trainer(alone) as built:
        built.train(disable_eval_tqdm=True)
        assert_equal(weights(built), expected)
        batch = built.collater([built.train_dataset[0]])
    # of structures of which the teacher could say nothing there are no edges either
    recorded = RecordedTeacher(tmp_path / "store")
    recorded._failed = {one.key(): "why" for one in structures_of(batch)}
    said = recorded.teach(batch, [EDGE, GRAPH])
    assert said.features[GRAPH].shape == (0, 5)
    assert said.features[GRAPH].dtype == torch.long
    assert said.features[EDGE].shape == (0, 20)
    assert said.sound(["energy"]).trusted.tolist() == [False]


COLUMNS = [
    Column("output:energy", "structure", (1,), "<f8"),
    Column(EDGES, "edge", (5,), "<i4"),
    Column("feature:edge:edge", "edge", (2,), "<f2"),
]


def said() -> Taught:
    """Two structures of two and three atoms with one and three edges, listed in turn."""
    graph = torch.tensor([[4, 2, 0, 0, -1], [0, 1, 0, 0, 0], [2, 4, 0, 0, 1], [3, 2, 1, 0, 0]])
    features = {GRAPH: graph, EDGE: torch.arange(8.0).view(4, 2)}
    outputs = {"energy": torch.tensor([[1.0], [2.0]], dtype=torch.float64)}
    return Taught(torch.tensor([2, 3]), outputs, features)


def structure(atoms: int) -> Structure:
    return Structure(np.ones(atoms), np.arange(3.0 * atoms).reshape(-1, 3), np.eye(3))


def test_records_with_edges(tmp_path: Path) -> None:
    assert columns_of(said(), {"energy": "system"}, "fp16") == COLUMNS
    answers = by_structure(said(), COLUMNS)
    assert answers[0][EDGES].tolist() == [[0, 1, 0, 0, 0]]
    assert answers[1][EDGES].tolist() == [[1, 0, 1, 0, 0], [2, 0, 0, 0, -1], [0, 2, 0, 0, 1]]
    assert answers[1]["feature:edge:edge"].tolist() == [[6, 7], [0, 1], [4, 5]]
    writer = Writer(tmp_path, COLUMNS)
    writer.append(list(zip(map(structure, (2, 3)), answers, strict=True)))
    writer.close()
    header = json.loads(next(tmp_path.glob("shards/*.json")).read_text())
    assert header["format"] == 2  # which earlier versions pass over
    names = [column.name for column in COLUMNS]
    records = [Reader(tmp_path).read(structure(n).key(), names) for n in (2, 3)]
    for record, atoms, answer in zip(records, (2, 3), answers, strict=True):
        assert record is not None
        assert fits(record, atoms, COLUMNS)
        assert not fits(record, 1, COLUMNS)  # an end that is none of its atoms
        for name in names:
            assert np.array_equal(record[name], answer[name])
    whole = joined(records, [2, 3], COLUMNS)
    assert whole[EDGES].tolist()[1] == [3, 2, 1, 0, 0]
    gap = joined([None, records[1]], [2, 3], COLUMNS)
    assert torch.equal(gap[EDGES], whole[EDGES][1:])
    short = {**records[1], EDGES: records[1][EDGES][:2]}
    assert not fits(short, 3, COLUMNS)


def test_a_shard_of_edges_under_the_earlier_format_is_passed_over(tmp_path: Path) -> None:
    writer = Writer(tmp_path, COLUMNS)
    writer.append([(structure(2), by_structure(said(), COLUMNS)[0])])
    writer.close()
    header = next(tmp_path.glob("shards/*.json"))
    told = json.loads(header.read_text())
    for change in ({"format": 1}, {"columns": told["columns"][:5]}):
        header.write_text(json.dumps({**told, **change}))
        reader = Reader(tmp_path)
        assert not reader.shards
        assert reader.strange == [header.stem]


def test_how_far_edges_are_apart() -> None:
    edges = np.arange(500).reshape(100, 5)
    column, feature = COLUMNS[1:]
    assert difference(column, edges, edges[::-1], 9) == 0
    assert difference(column, edges, edges[1:], 9) == 0  # one at the cutoff
    assert difference(column, edges, edges[10:], 9) == pytest.approx(0.08)
    assert difference(feature, np.ones((3, 2)), np.ones((4, 2)), 9) == 0


def test_structures_whose_edges_are_not_finite_are_not_trusted() -> None:
    spoiled = said()
    spoiled.features[EDGE][3, 0] = float("nan")
    sound = spoiled.sound([])
    assert sound.trusted.tolist() == [True, False]
    assert sound.features[EDGE].isfinite().all()
    assert torch.equal(sound.features[GRAPH], spoiled.features[GRAPH])
    assert said().sound([]).trusted is None


def test_the_block_takes_e2e() -> None:
    block = {"teacher": {"checkpoint": "t.pt"}, "losses": {"e2e": {"min_matched": "0.5"}}}
    term = parse_distillation({"distillation": block}).terms["e2e"]
    assert term.options.min_matched == 0.5
    assert term.coefficient == 100
