"""EquiformerV2, eSCN and eSEN as teachers and as students of whole trainings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from models import small_model
from trainings import (
    ALL_LOSSES,
    assert_equal,
    config,
    count_asked,
    trained,
    write_lmdb,
    write_teacher,
)
from trainings import data as data

from fairchem_kd.commands.main import main
from fairchem_kd.distillation.pairing import choose
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("painn", "equiformer_v2"),
        ("equiformer_v2_hydra", "escn_hydra"),
        ("escn", "esen_hydra"),
        ("esen_hydra_gradient", "gemnet_oc"),
    ],
)
def test_a_training_with_every_loss_and_again_from_its_store(
    tmp_path: Path,
    data: Path,
    student: str,
    teacher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second training reads what the teacher said, and ends with the same bits."""
    checkpoint = write_teacher(tmp_path / "teacher", data, teacher)
    given = config(
        tmp_path, data, model=student, teacher=checkpoint, losses=ALL_LOSSES, max_epochs=1
    )
    given["task"]["distillation"]["teacher"]["store"] = str(tmp_path / "store")
    first = trained({**given, "identifier": "first"})
    assert all(torch.isfinite(value).all() for value in first.values())

    asked = count_asked(monkeypatch)
    second = trained({**given, "identifier": "second"})
    assert sum(asked) < 11  # a look at whether the store still holds, and no more
    assert_equal(first, second)


@pytest.mark.parametrize("student", ["equiformer_v2", "escn"])
def test_a_teacher_that_is_asked_takes_no_random_numbers_from_such_a_student(
    tmp_path: Path, data: Path, student: str
) -> None:
    """With a loss that vanishes, a training has the bits of a plain one, edge frames and all."""
    checkpoint = write_teacher(tmp_path / "teacher", data, "equiformer_v2")
    plain = config(tmp_path, data, model=student, max_epochs=1)
    expected = trained({**plain, "identifier": "plain"}, OCPTrainer)
    given = config(
        tmp_path,
        data,
        model=student,
        teacher=checkpoint,
        losses={"n2n": {"coefficient": 1e-30}},
        distillation={"flush_denormal": False},
        max_epochs=1,
    )
    given["task"]["distillation"]["teacher"]["store"] = "off"
    assert_equal(trained({**given, "identifier": "kd"}), expected)


@pytest.mark.parametrize("teacher", ["equiformer_v2", "escn", "esen_hydra"])
def test_init_finds_features_of_a_pair(teacher: str) -> None:
    outputs = {"energy": {"level": "system"}, "forces": {"level": "atom"}}
    frozen = Teacher(small_model(teacher), Units({}, {}), outputs)
    for kind in ("n2n", "e2n", "v2v", "per_atom_energy", "vanilla"):
        assert choose(kind, small_model("painn"), frozen).kind == kind
    found = choose("v2v", small_model("painn"), frozen)
    assert found.options["teacher"] == "vector"
    assert "l = 1 of x" in found.comments["teacher"]


def test_the_tools_read_such_a_checkpoint(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_teacher(tmp_path / "teacher", data, "equiformer_v2")
    structures = write_lmdb(tmp_path / "some", 3, seed=5)
    out = [tmp_path / name for name in ("a.npz", "b.npz")]
    for seed, path in enumerate(out):
        torch.manual_seed(seed)
        argv = [checkpoint, structures, "--out", path, "--feature", "node", "--feature", "vector"]
        assert main(["features", *map(str, argv)]) == 0
    first, second = (np.load(path) for path in out)
    assert all(np.array_equal(first[key], second[key]) for key in first.files)
    capsys.readouterr()
    argv = [
        "--teacher",
        checkpoint,
        "--student",
        checkpoint,
        "--data",
        structures,
        "--out",
        tmp_path,
    ]
    assert main(["cka", *map(str, argv), "--json", "--no-plots", "--cpu"]) == 0
    assert "vector@2" in capsys.readouterr().out
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["forces"] == "direct"
    assert {f["fires"] for f in described["features"]} == {1}
