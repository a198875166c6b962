"""A teacher's error on the student's labels, and another zero of energy, before the first step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import config, trainer, write_lmdb
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.distillation.agreement import Agreement, _without_zero, agreement, tell_agreement
from fairchem_kd.errors import UserError


def test_the_errors_are_those_of_a_loop(tmp_path: Path, data: Path, teacher: Path) -> None:
    with trainer(config(tmp_path, data, teacher=teacher, losses={"vanilla": {}})) as built:
        built.make_distillation()
        live = built.distillation.teacher
        found = agreement(live, [], built.train_dataset, built.collater, built.device)
        assert found is not None
        energy, forces = [], []
        for index in range(len(built.train_dataset)):
            batch = built.collater([built.train_dataset[index]])
            said = live.teach(batch, [])
            energy.append(abs(float(said.outputs["energy"]) - float(batch.energy)))
            forces.append((said.outputs["forces"] - batch.forces).abs().flatten())
    assert found.structures == 11
    assert found.energy == pytest.approx(np.mean(energy), rel=1e-4)
    assert found.forces == pytest.approx(float(torch.cat(forces).mean()), rel=1e-4)


def test_what_is_left_beside_energies_of_the_elements() -> None:
    draw = np.random.default_rng(0)
    compositions = np.zeros((40, 120))
    compositions[:, [1, 6, 8]] = draw.integers(1, 6, (40, 3))
    noise = draw.normal(scale=0.01, size=40)
    shifted = compositions[:, [1, 6, 8]] @ [13.6, 1000.0, -2.0] + noise
    left = _without_zero(shifted, compositions)
    assert left is not None
    assert left < 0.02
    assert _without_zero(shifted[:11], compositions[:11]) is None  # too few to say


@pytest.mark.parametrize("compares", [True, False])
def test_another_zero_is_refused_where_energies_are_compared(
    compares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = Agreement(64, 14.0, 0.05, 0.03)
    if compares:
        with pytest.raises(UserError, match=r"different zeros: they differ by 14 eV .*0\.03 eV"):
            tell_agreement(other, compares)
    else:
        tell_agreement(other, compares)
        assert "this does no harm" in caplog.text
    for fine in (Agreement(64, 14.0, 3.0, 9.0), Agreement(64, 0.2, 0.1, 0.01), None,
                 Agreement(64, 14.0, 3.0, None), Agreement(64, None, 3.0, None)):  # fmt: skip
        tell_agreement(fine, compares_energies=True)


def test_a_training_says_how_its_teacher_does(
    tmp_path: Path, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    monkeypatch.setattr(logging, "disable", lambda *_: None)
    with caplog.at_level(logging.INFO), trainer(given) as built:
        built.set_up()
    (line,) = [r.getMessage() for r in caplog.records if "own labels" in r.getMessage()]
    assert "meV and forces" in line


def test_labels_with_another_zero_end_a_training_before_its_first_step(
    tmp_path: Path, teacher: Path
) -> None:
    """Labels that are the teacher's own energies, but for an energy of each element."""
    data = tmp_path / "data"
    write_lmdb(data / "train", 40, seed=0)
    write_lmdb(data / "val", 4, seed=50)
    given: dict[str, Any] = config(tmp_path, data, teacher=teacher, losses={"vanilla": {}})
    with trainer(given) as built:
        live = built.make_distillation()
        said: dict[int, float] = {}  # by the file's order, which a data set shuffles
        for index in range(40):
            batch = built.collater([built.train_dataset[index]])
            shift = float(5.0 * batch.atomic_numbers.sum())
            energy = float(live.teach(batch, []).outputs["energy"])
            said[int(batch.sid[0])] = energy + shift
    shutil.rmtree(data / "train")
    write_lmdb(data / "train", 40, seed=0, energy=lambda _, index: said[index])
    with (
        trainer(given) as built,
        pytest.raises(UserError, match="different zeros"),
    ):
        built.train(disable_eval_tqdm=True)
