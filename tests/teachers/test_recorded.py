"""A store without its teacher: what it holds teaches, and what it lacks is said before step 1."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stored import refused
from trainings import ALL_LOSSES, assert_equal, config, trainer, weights, write_lmdb
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.store.failures import note_failure
from fairchem_kd.teachers import LiveTeacher
from fairchem_kd.teachers.answers import structures_of
from fairchem_kd.teachers.recorded import RecordedTeacher


def given(root: Path, data: Path, own: dict[str, Any], **distillation: Any) -> dict[str, Any]:
    block = {"teacher": own, "losses": ALL_LOSSES, **distillation}
    return config(root, data, distillation=block)


def trained(arguments: dict[str, Any], **more: Any) -> dict[str, torch.Tensor]:
    with trainer(arguments, **more) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """A folder with a store that a training has filled, and the weights at its end."""
    root = tmp_path_factory.mktemp("filled")
    more = write_lmdb(root / "more", 6, seed=90)
    own = {"checkpoint": str(teacher), "store": str(root / "store")}
    torch.save(trained(given(root, data, own, **companions(more))), root / "weights.pt")
    return root


def companions(more: Path) -> dict[str, Any]:
    return {
        "rattle": {"copies": 0.5, "std": [0.02, 0.05], "pool": 2},
        "unlabelled": {"dataset": {"format": "lmdb", "src": str(more)}},
    }


def test_the_store_alone_teaches_the_same(
    filled: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, energies of atoms, features, unlabelled structures and copies; bit for bit."""
    monkeypatch.setattr(LiveTeacher, "teach", lambda *_, **__: pytest.fail("nobody is here"))
    alone = given(tmp_path, data, {"store": str(filled / "store")}, **companions(filled / "more"))
    expected = torch.load(filled / "weights.pt", weights_only=True)
    assert_equal(trained(alone), expected)
    assert_equal(trained(alone, is_debug=True), expected)
    alone["optimizer"]["num_workers"] = 1
    assert_equal(trained(alone), expected)


def test_what_is_missing_is_said_before_the_first_step(
    filled: Path, tmp_path: Path, data: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(filled / "store", store)
    (store / "filled.jsonl").unlink()
    own = {"store": str(store)}
    more = write_lmdb(tmp_path / "others", 4, seed=700)
    unlabelled = {"dataset": {"format": "lmdb", "src": str(more)}}
    with refused(
        r"lacks 4 of 4 structures of unlabelled\.dataset, and without teacher\.checkpoint nobody "
        r"can be asked: `fairchem-kd teach CONFIG\.yml --teacher .*teacher\.pt --out .*` fills it"
    ):
        trained(given(tmp_path, data, own, unlabelled=unlabelled))
    with refused(r"lacks \d+ of \d+ structures of rattled copies of dataset\.train"):
        trained(given(tmp_path, data, own, rattle={"copies": 1, "pool": 2, "pool_seed": 5}))
    with refused(r"rattle\.pool is null, so that copies are new at every step"):
        trained(given(tmp_path, data, own, rattle={"copies": 1, "pool": None}))
    losses = {"n2n": {"teacher": "node@1"}}
    with refused(r"losses\.n2n\.teacher: the store .* holds no feature 'node@1'"):
        trained(given(tmp_path, data, own, losses=losses))
    with refused("lacks 4 of 4 structures of dataset.val"):
        val = {"validate": True}
        trained(given(tmp_path, data, own, losses={"vanilla": {}}, **val))


def test_a_store_that_is_none_or_empty(filled: Path, tmp_path: Path, data: Path) -> None:
    with refused(r"there is no store .*gone, and without teacher\.checkpoint"):
        trained(given(tmp_path, data, {"store": str(tmp_path / "gone")}))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(filled / "store/store.json", empty)
    with refused("empty holds no answers"):
        trained(given(tmp_path, data, {"store": str(empty)}))
    for store in ("auto", "off"):
        with refused(r"teacher\.checkpoint is required by .*or in teacher\.store"):
            trained(given(tmp_path, data, {"store": store}))
    assert parse_distillation(
        {"distillation": {"teacher": {"store": "x"}, "losses": {"vanilla": {}}}}
    ).teacher.is_recorded


def test_structures_that_failed_do_not_count_and_too_many_are_refused(
    filled: Path, tmp_path: Path, data: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(filled / "store", store)
    own = {"store": str(store)}
    more = write_lmdb(tmp_path / "others", 4, seed=700)
    unlabelled = {"dataset": {"format": "lmdb", "src": str(more)}}
    arguments = given(tmp_path, data, own, losses={"vanilla": {}}, unlabelled=unlabelled)
    with trainer(arguments) as built:
        built.companions = built.make_companions(lambda numbers: None)
        dataset = built.companions.unlabelled.dataset
        batch = built.collater([dataset[i] for i in range(4)])
    del dataset
    gc.collect()  # closes it
    for structure in structures_of(batch)[:2]:
        note_failure(store, structure.key(), {"why": "no convergence"})
    alone = RecordedTeacher(store)
    with pytest.raises(UserError, match="does not hold 2 of 4 structures of a batch"):
        alone.teach(batch, ())
    for structure in structures_of(batch)[2:]:
        note_failure(store, structure.key(), {"why": "no convergence"})
    said = RecordedTeacher(store).teach(batch, ()).sound(["energy", "forces"])
    assert said.trusted is not None
    assert not said.trusted.any()
    with refused(r"could say nothing of 4 of 4 structures of unlabelled\.dataset"):
        trained(arguments)


def test_a_card_that_lies_about_its_calculator(filled: Path, tmp_path: Path, data: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(filled / "store", store)
    told = json.loads((store / "store.json").read_text())
    for wrong in ("emt", [1], {}, {"factory": 1, "arguments": {}}, {"factory": "a", "arguments": 1},
                  {"factory": "a:b", "arguments": {}, "features": 3}):  # fmt: skip
        (store / "store.json").write_text(json.dumps({**told, "calculator": wrong}))
        with refused("is not what a store's is"):
            trained(given(tmp_path, data, {"store": str(store)}))
