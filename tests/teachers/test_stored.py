"""A training that reads what its teacher said: the same bits, and never a wrong answer."""

from __future__ import annotations

import errno
import gc
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import (
    ALL_LOSSES,
    assert_equal,
    config,
    count_asked,
    trainer,
    weights,
    write_lmdb,
    write_teacher,
)
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.distillation import keeping
from fairchem_kd.errors import UserError
from fairchem_kd.store import Card, Reader, Writer
from fairchem_kd.teachers import LiveTeacher, filling
from fairchem_kd.teachers.contents import check_records, contents
from fairchem_kd.teachers.place import FOLDER
from fairchem_kd.teachers.stored import StoredTeacher


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Structures without labels."""
    return write_lmdb(tmp_path / "more", 6, seed=90)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many structures the live teacher is asked about, call by call."""
    return count_asked(monkeypatch)


def arguments(root: Path, data: Path, teacher: Path, **distillation: Any) -> dict[str, Any]:
    own = {"checkpoint": str(teacher), **distillation.pop("own", {})}
    block = {"teacher": own, "losses": ALL_LOSSES, **distillation}
    return config(root, data, distillation=block)


def trained(given: dict[str, Any], **more: Any) -> dict[str, torch.Tensor]:
    with trainer(given, **more) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


@contextmanager
def refused(match: str) -> Iterator[None]:
    """The block raises a UserError; what its frames held, open data sets above all, is let go."""
    with pytest.raises(UserError, match=match):
        yield
    gc.collect()


def store_in(root: Path) -> Path:
    (folder,) = (root / FOLDER).iterdir()
    return folder


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=2e-3, atol=2e-5, msg=name)


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines that are logged in the block; a trainer silences them otherwise."""
    lines: list[str] = []
    disable, logging.disable = logging.disable, lambda *_: None  # type: ignore[assignment]
    try:
        with caplog.at_level(logging.INFO):
            yield lines
    finally:
        logging.disable = disable
        lines += [record.getMessage() for record in caplog.records]


def test_a_training_from_a_store_is_the_live_one_and_repeats_bit_for_bit(
    tmp_path: Path, data: Path, teacher: Path, more: Path, asked: list[int]
) -> None:
    companions = {
        "rattle": {"copies": 0.5, "std": [0.02, 0.05], "pool": 2},
        "unlabelled": {"dataset": {"format": "lmdb", "src": str(more)}},
        "validate": True,
    }
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}, **companions))
    assert not (tmp_path / FOLDER).exists()
    given = arguments(tmp_path, data, teacher, **companions)
    first = trained(given)
    asked.clear()
    assert_equal(trained(given), first)  # another run, the same answers
    assert sum(asked) <= 5  # one to know the columns, four to be sure
    assert_near(first, live)
    trained(given, seed=4)  # another seed takes its copies from the same pools
    assert sum(asked) <= 10


def test_what_a_store_says_is_what_the_teacher_says(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Structure by structure, however they are batched."""
    with trainer(arguments(tmp_path, data, teacher)) as built:
        built.set_up()
        stored, requests = built.distillation.teacher, built.distillation.teacher_requests
        assert isinstance(stored, StoredTeacher)
        for indices in ([0], [3, 1, 2], [5, 5, 10]):
            batch = built.collater([built.train_dataset[i] for i in indices])
            assert batch.said["missing"] == []
            said, live = stored.teach(batch, requests), stored.live.teach(batch, requests)
            assert said.outputs.keys() == live.outputs.keys()
            for name, values in live.outputs.items():
                torch.testing.assert_close(said.outputs[name], values, rtol=1e-4, atol=1e-4)
                assert said.outputs[name].dtype == torch.float64
            for request, values in live.features.items():
                torch.testing.assert_close(said.features[request], values, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(said.atom_energies, live.atom_energies, rtol=1e-4, atol=1e-4)
            assert list(said.atom_energies) == ["energy"]


def test_a_store_that_was_cut_off_while_it_was_filled_goes_on(
    tmp_path: Path, data: Path, teacher: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as without the kill; what was whole is not asked about again."""
    monkeypatch.setattr(filling, "GROUP", 3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trained(arguments(whole, data, teacher))
    complete = sum(asked)
    asked.clear()
    append, groups = Writer.append, []

    def killed(self: Writer, records: Any) -> None:
        groups.append(len(records))
        if len(groups) == 3:  # in the middle of the third group
            append(self, records[:1])
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Writer, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(arguments(cut, data, teacher))
    gc.collect()
    monkeypatch.setattr(Writer, "append", append)
    assert len(Reader(store_in(cut))) in (6, 7)  # one of the two may be the last, smaller group
    index = next(store_in(cut).glob("shards/*.index"))
    index.write_bytes(index.read_bytes()[:-7])  # and of the last entry, a part is lost as well
    asked.clear()
    assert_equal(trained(arguments(cut, data, teacher)), expected)
    assert sum(asked) < complete
    assert_same_answers(store_in(cut), store_in(whole))


def assert_same_answers(one: Path, other: Path) -> None:
    left, right = Reader(one), Reader(other)
    for shard in left.shards:
        for entry in shard.entries:
            key = entry["key"].tobytes()
            names = [column.name for column in shard.columns]
            found, expected = left.read(key, names), right.read(key, names)
            assert found is not None
            assert expected is not None
            for name in names:
                assert np.array_equal(found[name], expected[name]), name


def test_a_structure_that_changed_is_asked_about_again(
    tmp_path: Path, teacher: Path, asked: list[int]
) -> None:
    data = tmp_path / "data"
    write_lmdb(data / "train", 11, seed=0)
    write_lmdb(data / "val", 4, seed=50)
    trained(arguments(tmp_path, data, teacher))
    shutil.rmtree(data / "train")

    def moved(pos: torch.Tensor, index: int) -> torch.Tensor:
        return pos + (0.01 if index == 4 else 0.0) * torch.eye(len(pos), 3)

    write_lmdb(data / "train", 11, seed=0, pos=moved)
    asked.clear()
    stored = trained(arguments(tmp_path, data, teacher))
    assert len(Reader(store_in(tmp_path))) == 12
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}))
    assert_near(stored, live)


def test_a_store_of_another_teacher_is_never_used(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    named = {"store": str(tmp_path / "mine")}
    trained(arguments(tmp_path, data, teacher, own=named))
    other = write_teacher(tmp_path / "other", data, seed=8)
    with refused(r"mine keeps what another teacher said .* not .*other"):
        trained(arguments(tmp_path, data, other, own=named))
    trained(arguments(tmp_path, data, teacher))
    trained(arguments(tmp_path, data, other))
    assert len(list((tmp_path / FOLDER).iterdir())) == 2  # `auto` has one for each


def test_a_teacher_that_says_something_else_now_is_refused(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(arguments(tmp_path, data, teacher))
    teach = LiveTeacher.teach

    def drifted(self: LiveTeacher, batch: Any, requests: Any, **more: Any) -> Any:
        said = teach(self, batch, requests, **more)
        said.outputs["forces"].mul_(1.05)
        return said

    monkeypatch.setattr(LiveTeacher, "teach", drifted)
    with refused(r"output:forces of record \d+ .* remove the store"):
        trained(arguments(tmp_path, data, teacher))


def test_a_teacher_whose_answers_rounding_decides_is_no_other_one(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GemNet-OC's on slabs, where many neighbours are as near; but not one that has changed."""
    given = arguments(tmp_path, data, teacher)
    trained(given)
    teach = LiveTeacher.teach
    calls = count()
    size, shift = 0.01, 0.0  # eV per atom, about

    def restless(self: LiveTeacher, batch: Any, requests: Any, **more: Any) -> Any:
        said = teach(self, batch, requests, **more)
        energy = said.outputs["energy"]
        noise = size * torch.sin(2.0 * torch.arange(len(energy)) + next(calls))
        energy.add_((noise.reshape(energy.shape) + shift) * batch.natoms.reshape(energy.shape))
        return said

    monkeypatch.setattr(LiveTeacher, "teach", restless)
    trained(given)
    size, shift = 1e-4, 0.01
    with refused(r"output:energy of record \d+ .* eV per atom, where 0\.00\d+ is usual"):
        trained(given)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_what_is_damaged_is_asked_for_again(
    tmp_path: Path, data: Path, teacher: Path, damage: str
) -> None:
    given = arguments(tmp_path, data, teacher)
    trained(given)
    store = store_in(tmp_path)
    path = next(store.glob("shards/*.data"))
    spoiled = bytearray(path.read_bytes())
    if damage == "flip":
        spoiled[-9] ^= 4
    else:
        del spoiled[-9:]
    path.write_bytes(spoiled)
    assert check_records(store) == (10, 1)
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}))
    assert_near(trained(given), live)


def test_nothing_that_is_strange_is_taken_for_a_store(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    named = {"store": str(strange)}
    with refused(r"strange is no store .* name another folder"):
        trained(arguments(tmp_path, data, teacher, own=named))
    assert [path.name for path in strange.iterdir()] == ["thesis.tex"]
    for card, message in (
        ("{", "cannot be read"),
        ('{"format": 7}', "has format 7, and this fairchem-kd reads 1"),
        ('{"format": 1}', "is not what a store's is"),
        ("[1]", "cannot be read"),
    ):
        (strange / "store.json").write_text(card)
        with refused(message):
            trained(arguments(tmp_path, data, teacher, own=named))
    with refused(r"thesis\.tex is a file; name a folder"):
        trained(arguments(tmp_path, data, teacher, own={"store": str(strange / "thesis.tex")}))


def test_a_place_that_cannot_be_written_leaves_the_teacher_live(
    tmp_path: Path, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAIRCHEM_KD_STORE", str(tmp_path / "file" / "below"))
    with logged(caplog) as lines:
        trained(arguments(tmp_path, data, teacher, losses={"n2n": {}}))
    assert any("is not kept" in line and "cannot be written" in line for line in lines)


@pytest.mark.parametrize("why", ["limit", "disk"])
def test_what_has_no_room_stays_live(
    tmp_path: Path, data: Path, teacher: Path, why: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(filling, "GROUP", 3)
    live = trained(arguments(tmp_path, data, teacher, own={"store": "off"}))
    given = arguments(tmp_path, data, teacher)
    if why == "limit":
        given["task"]["distillation"]["teacher"]["max_gb"] = 4e-5
    else:
        append, groups = Writer.append, []

        def full(self: Writer, records: Any) -> None:
            groups.append(records)
            if len(groups) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, records)

        monkeypatch.setattr(Writer, "append", full)
    with logged(caplog) as lines:
        stored = trained(given)
    assert 0 < len(Reader(store_in(tmp_path))) < 11
    told = "max_gb" if why == "limit" else "the disk is full"
    assert sum("lacks some" in line and told in line for line in lines) == 1
    assert_near(stored, live)


def test_a_training_that_sees_a_part_of_its_structures_asks_about_no_more(
    tmp_path: Path, data: Path, teacher: Path, asked: list[int]
) -> None:
    """Ten structures of which one epoch of the labelled ones sees one or two."""
    more = write_lmdb(tmp_path / "many", 60, seed=90)
    unlabelled = {"dataset": {"format": "lmdb", "src": str(more)}, "share": 0.5}
    given = arguments(tmp_path, data, teacher, unlabelled=unlabelled)
    given["optimizer"]["max_epochs"] = 1
    trained(given)
    assert len(Reader(store_in(tmp_path))) == 11  # the labelled ones
    assert sum(asked) < 50


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_features_in_half_precision(
    tmp_path: Path, data: Path, teacher: Path, precision: str
) -> None:
    given = arguments(tmp_path, data, teacher, own={"store_features": precision})
    halves = trained(given)
    store = store_in(tmp_path)
    assert store.name.endswith(f"-{precision}")
    card = Card.read(store)
    assert card is not None
    assert 1e-5 < card.dependence["feature:node:node"] < 0.05  # the rounding, measured
    assert card.dependence["output:forces"] < 1e-4
    assert precision.replace("fp16", "<f2") in contents(store)
    assert_equal(trained(given), halves)
    named = {"store": str(store)}
    with refused(f"keeps features as {precision}"):
        trained(arguments(tmp_path, data, teacher, own=named))


def test_a_feature_that_the_store_lacks_is_asked_for(
    tmp_path: Path, data: Path, teacher: Path, asked: list[int]
) -> None:
    """And then both are there, in records of their own."""
    trained(arguments(tmp_path, data, teacher, losses={"n2n": {}}))
    asked.clear()
    stored = trained(arguments(tmp_path, data, teacher, losses={"v2v": {}}))
    assert sum(asked) >= 11
    live = arguments(tmp_path, data, teacher, losses={"v2v": {}}, own={"store": "off"})
    assert_near(stored, trained(live))
    assert len(Reader(store_in(tmp_path))) == 22
    asked.clear()
    both = {"n2n": {}, "v2v": {}}
    stored = trained(arguments(tmp_path, data, teacher, losses=both))
    assert sum(asked) <= 5
    assert_near(
        stored, trained(arguments(tmp_path, data, teacher, losses=both, own={"store": "off"}))
    )


def test_what_another_run_keeps_meanwhile_is_read(
    tmp_path: Path, data: Path, teacher: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends its filling after this one has looked, and before this one asks whether to fill."""
    given = arguments(tmp_path, data, teacher)
    expected = trained(given)
    store = store_in(tmp_path)
    for name in ("shards", "filled.jsonl"):
        (store / name).rename(tmp_path / name)
    verify = keeping._verify

    def ended(*args: Any) -> None:
        for name in ("shards", "filled.jsonl"):
            (tmp_path / name).rename(store / name)
        verify(*args)

    monkeypatch.setattr(keeping, "_verify", ended)
    asked.clear()
    assert_equal(trained(given), expected)
    assert sum(asked) <= 5


def test_a_store_has_one_precision(
    tmp_path: Path, data: Path, teacher: Path, asked: list[int]
) -> None:
    """Stores of other precision are never mixed, neither by `auto` nor by name."""
    given = arguments(tmp_path, data, teacher, own={"precision": "bf16"})
    halves = trained(given)
    store = store_in(tmp_path)
    card = Card.read(store)
    assert card is not None
    assert card.precision == "bf16"
    assert "computed in bf16" in contents(store)
    asked.clear()
    assert_equal(trained(given), halves)
    assert sum(asked) <= 5
    with refused("computed in bf16, and task.distillation.teacher.precision is fp32"):
        trained(arguments(tmp_path, data, teacher, own={"store": str(store)}))
    exact = trained(arguments(tmp_path, data, teacher))
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    assert any(not torch.equal(value, exact[name]) for name, value in halves.items())
    card_file = store / "store.json"
    card_file.write_text(card_file.read_text().replace('"bf16"', '"fp8"', 1))
    with refused("is not what a store's is"):
        trained(given)


def test_debugging_runs_and_plain_trainings_keep_nothing(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    trained(arguments(tmp_path, data, teacher), is_debug=True)
    trained(config(tmp_path, data, losses=None))
    assert not (tmp_path / FOLDER).exists()


def test_workers_read_ahead(tmp_path: Path, data: Path, teacher: Path) -> None:
    given = arguments(tmp_path, data, teacher, rattle={"copies": 0.5})
    expected = trained(given)
    given["optimizer"]["num_workers"] = 2
    assert_equal(trained(given), expected)
