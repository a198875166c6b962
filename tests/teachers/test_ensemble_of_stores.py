"""Ensembles of what teachers have said: stores without a model, alone and beside checkpoints."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from trainings import (
    assert_equal,
    config,
    inside,
    trainer,
    weights,
    write_home,
    write_lmdb,
    write_yaml,
)

from fairchem_kd.commands.main import main
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.distillation.members import check_forces
from fairchem_kd.errors import UserError
from fairchem_kd.teachers import EnsembleTeacher
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.training.records import read_records

STORES = ["stores/a", "stores/b", "stores/c"]
FACTORS = dict(zip(STORES, (0.9, 1.0, 1.2), strict=True))
WHERE = "task.distillation.teacher"


def fill(store: str, factor: float, *more: str) -> None:
    told = json.dumps({"energy": factor, "forces": factor, "with_features": bool(more)})
    toy = ["--calculator", "toy_calculators:Toy", "--calculator-args", told]
    assert main(["teach", "data/train", *toy, "--out", store, *more]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with inside(folder):
        write_home({"train": 11, "val": 2}, model="painn")
        write_lmdb(Path("more"), 2, seed=90)
        for store, factor in FACTORS.items():
            fill(store, factor)
        fill("stores/featured", 1.1, "--features", "node")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    yield tmp_path / "home"
    logging.disable(logging.NOTSET)
    gc.collect()


def given(teacher: dict[str, Any], **distillation: Any) -> dict[str, Any]:
    block = {"teacher": teacher, "losses": {"vanilla": {}}, **distillation}
    return config(Path(), Path("data"), distillation=block, max_epochs=1)


def test_mean_and_spread_are_those_of_what_is_stored(home: Path) -> None:
    """EMT's energies and forces times a factor each: mean and deviation in a loop."""
    with trainer(given({"store": STORES})) as built:
        built.set_up()
        batch = built.collater([built.train_dataset[i] for i in range(4)])
        said = built.distillation.teacher.teach(batch, ())
    factors = np.array(list(FACTORS.values()))
    start = 0
    for system, number in enumerate(batch.natoms.tolist()):
        energy = float(batch.energy[system])
        assert said.outputs["energy"][system].item() == pytest.approx(
            energy * factors.mean(), abs=2e-4
        )
        spread = abs(energy) * factors.std(ddof=1)
        assert said.spread["energy"][system].item() == pytest.approx(spread, abs=2e-4)
        forces = batch.forces[start : start + number].double().numpy()
        mean = said.outputs["forces"][start : start + number].numpy()
        assert np.allclose(mean, factors.mean() * forces, atol=2e-4)
        total = 0.0
        for row in forces:
            total += sum(float(x) ** 2 for x in row) * factors.var(ddof=1)
        spread = (total / (3 * number)) ** 0.5
        assert said.spread["forces"][system].item() == pytest.approx(spread, abs=2e-4)
        start += number


def test_a_training_asks_nobody_weighs_masks_and_repeats(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EMT, "calculate", lambda *_: pytest.fail("a training asks nobody"))
    limit = {"weights": True, "limit": {"forces": 0.2}, "features": "stores/b"}
    ended = []
    for teacher in ({"store": STORES, "ensemble": limit}, {"store": f"[{', '.join(STORES)}]"}):
        for _ in range(2):
            with trainer(given(teacher)) as built:
                built.train(disable_eval_tqdm=True)
                ended.append(weights(built))
                folder = built.config["cmd"]["checkpoint_dir"]
                told = [one["metrics"] for one in read_records(folder, "train")]
                if "ensemble" in teacher:
                    assert 0 < sum(one["masked"] for one in told) < len(told)
                assert len(built.distillation.teacher.stores) == 3
    assert_equal(ended[0], ended[1])
    assert_equal(ended[2], ended[3])
    assert any(not torch.equal(ended[0][name], ended[2][name]) for name in ended[0])


def test_a_store_stands_beside_checkpoints(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = given({"checkpoint": ["teacher.pt", "stores/b"]}, losses={"vanilla": {}, "n2n": {}})
    with trainer(mixed) as built:
        built.set_up()
        teacher = built.distillation.teacher
        assert len(teacher.stores) == 2
        batch = built.collater([built.train_dataset[i] for i in range(3)])
        said = teacher.teach(batch, built.distillation.teacher_requests)
        alone = teacher.lives[0].teach(batch, ()).outputs["energy"]
        expected = (alone.view(-1) + batch.energy) / 2
        torch.testing.assert_close(said.outputs["energy"].view(-1), expected, atol=2e-4, rtol=1e-4)
        assert [request.address for request in said.features] == ["node"]
        built.train(disable_eval_tqdm=True)


def test_features_come_from_the_store_that_is_named(home: Path) -> None:
    stores = [*STORES[:2], "stores/featured"]
    teacher = {"store": stores, "ensemble": {"features": "stores/featured"}}
    with trainer(given(teacher, losses={"n2n": {}, "vanilla": {}})) as built:
        built.set_up()
        batch = built.collater([built.train_dataset[0]])
        said = built.distillation.teacher.teach(batch, built.distillation.teacher_requests)
        assert [v.shape[1] for v in said.features.values()] == [3]


def test_a_member_that_failed_leaves_its_structures_untrusted(home: Path) -> None:
    args = json.dumps({"energy": 1.05, "forces": 1.05, "fails": 29})
    toy = ["--calculator", "toy_calculators:Toy", "--calculator-args", args]
    assert main(["teach", "data/train", *toy, "--out", "stores/d"]) == 0
    with trainer(given({"store": ["stores/a", "stores/d"]})) as built:
        built.set_up()
        batch = built.collater([built.train_dataset[i] for i in range(4)])
        said = built.distillation.teacher.teach(batch, ()).sound(["energy", "forces"])
        copper = [29 in batch.atomic_numbers[batch.batch == i].tolist() for i in range(4)]
        assert said.trusted.tolist() == [not one for one in copper]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"store": ["a", "./a"]}, r"store\[1\]: ./a is the same folder as a"),
        ({"store": ["a", "auto"]}, r"store\[1\] is auto, which is no store"),
        ({"store": ["a", "OFF"]}, r"store\[1\] is OFF, which is no store"),
        ({"store": ["a", None]}, "must be"),
        ({"store": ["a", 3]}, "must be"),
        ({"store": ["a", ""]}, r"store\[1\] is empty"),
        ({"store": []}, "must be auto, off or a folder, not empty"),
        ({"store": {"a": 1}}, "store must be"),
        ({"store": ["a", "b"], "checkpoint": "c.pt"}, "there is a .*checkpoint too"),
        ({"store": ["a", "b"], "checkpoint": ["c.pt", "d.pt"]}, "there is a .*checkpoint too"),
        ({"store": ["a", "b"], "ensemble": {"features": "c"}}, "none of teacher.store"),
        ({"store": ["a"], "ensemble": {}}, "names fewer than two"),
    ],
)
def test_what_is_no_list_of_stores_is_refused(teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_distillation({"distillation": {"teacher": teacher, "losses": {"vanilla": {}}}})


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        ({"store": ["stores/a", "gone"]}, {}, r"store\[1\]: there is no store gone"),
        ({"store": ["stores/a", "data"]}, {}, r"store\[1\]: data is no store of a teacher's"),
        ({"store": ["stores/a", "copy"]}, {}, r"store\[1\]: copy is the same teacher as stores/a"),
        ({"checkpoint": ["teacher.pt", "data"]}, {}, r"checkpoint\[1\]: data is no store"),
        ({"store": STORES}, {"losses": {"n2n": {}}}, "holds no feature 'node'"),
        ({"store": STORES}, {"losses": {"jacobian": {}}}, "a store alone does not have"),
        (
            {"store": STORES},
            {"rattle": {"copies": 1, "pool": None}},
            "pool is null, so that copies are new at every step",
        ),
        (
            {"store": STORES},
            {"rattle": {"copies": 1, "pool": 2}},
            r"store\[0\]: stores/a lacks 11 of 11 structures of rattled copies",
        ),
        (
            {"checkpoint": ["teacher.pt", "stores/b"]},
            {"unlabelled": {"dataset": {"format": "lmdb", "src": "more"}}},
            r"checkpoint\[1\]: stores/b lacks 2 of 2 structures of unlabelled",
        ),
    ],
)
def test_stores_that_do_not_serve_are_refused(
    home: Path, teacher: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    shutil.copytree("stores/a", "copy")
    arguments = given(teacher, **more)
    with trainer(arguments) as built, pytest.raises(UserError, match=words):
        built.set_up()


def test_a_member_with_other_outputs_is_refused(home: Path) -> None:
    members = [
        RecordedTeacher(Path(store), f"{WHERE}.store[{i}]") for i, store in enumerate(STORES)
    ]
    del members[2].levels["forces"]
    words = r"store\[2\]: stores/c does not predict 'forces' .* and stores/a does"
    with pytest.raises(UserError, match=words):
        EnsembleTeacher(members)


@pytest.mark.parametrize(("factor", "words"), [(23.06, "25.6"), (-1.0, "-1.1"), (0.02, "0.02")])
def test_forces_in_other_units_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, factor: float, words: str
) -> None:
    """The one of three that differs from both others is named; times those of 0.9 EMT."""
    teach = LiveTeacher.teach

    def turned(self: LiveTeacher, batch: Any, requests: Any, **given: Any) -> Any:
        said = teach(self, batch, requests, **given)
        said.outputs["forces"].copy_(factor * batch.forces)  # type: ignore[attr-defined]
        return said

    monkeypatch.setattr(LiveTeacher, "teach", turned)
    mixed = given({"checkpoint": ["stores/a", "stores/b", "teacher.pt"], "store": "off"})
    with (
        trainer(mixed) as built,
        pytest.raises(UserError, match=rf"teacher.pt are {words}\d* times those of stores/a"),
    ):
        built.set_up()


def test_the_command_fills_one_of_them_at_a_time(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"ensemble": {"weights": True}}
    write_yaml(Path("config.yml"), given({"store": ["stores/a", "stores/new"], **more}))
    args = json.dumps({"energy": 1.3, "forces": 1.3})
    toy = ["--calculator", "toy_calculators:Toy", "--calculator-args", args]
    assert main(["teach", "config.yml"]) == 2
    assert "there is nobody to ask" in capsys.readouterr().err
    assert main(["teach", "config.yml", *toy]) == 2
    assert "names several stores: say with --out" in capsys.readouterr().err
    assert main(["teach", "config.yml", *toy, "--out", "stores/new"]) == 0
    with trainer(given({"store": ["stores/a", "stores/new"], **more})) as built:
        built.set_up()
        assert len(built.distillation.teacher.stores) == 2


def test_forces_of_one_unit_pass_however_unlike_they_are() -> None:
    """Uncorrelated, and alike with a ratio of 2: the latter is what models may have."""

    class Seen:
        def __init__(self, forces: np.ndarray) -> None:
            self.products = forces @ forces.T

    rng = np.random.default_rng(0)
    one = rng.normal(size=300)
    for other in (2 * one, 50 * rng.normal(size=300), np.zeros(300)):
        check_forces(None, Seen(np.stack([one, other])))  # type: ignore[arg-type]
