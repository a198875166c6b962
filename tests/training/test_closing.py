"""What a training tells at its end, against errors that are worked out another way."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model
from trainings import config, trainer, write_lmdb
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.features.wrappers import stock_model_config
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.text import digits
from fairchem_kd.training.closing import Judged, closing_lines, judge, tell_end


def by_hand(built: Any, model: torch.nn.Module, scales: Any) -> dict[str, float]:
    """MAE of energies in eV and of free atoms' forces in eV/Å, structure by structure."""
    energy, forces = [], []
    for sample in built.val_dataset:
        batch = built.collater([sample])
        with torch.no_grad():
            out = model(batch)
        mean, rmsd, scale = scales
        energy.append(abs(float(out["energy"]) * rmsd + mean - float(sample.energy)))
        free = batch.fixed == 0
        forces.append((out["forces"] * scale - batch.forces)[free].abs().flatten())
    return {"energy": sum(energy) / len(energy), "forces": float(torch.cat(forces).mean())}


def test_large_errors_are_whole_numbers() -> None:
    shown = {0.0: "0", 0.0123: "0.0123", 22.94: "22.9", 999.4: "999", 1093.6: "1094", 2e7: "2e+07"}
    assert {value: digits(value) for value in shown} == shown
    assert [digits(value, "+") for value in (12.3, -1093.6)] == ["+12.3", "-1094"]


def test_student_and_teacher_are_judged_on_the_same(
    tmp_path: Path, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(config(tmp_path, data, teacher=teacher, losses={"n2n": {}})) as built:
        built.train(disable_eval_tqdm=True)
        (folder,) = tmp_path.glob("checkpoints/*-test")
        before = {k: v.clone() for k, v in built._unwrapped_model.state_dict().items()}
        (judged,) = judge(built, folder / "best_checkpoint.pt")
        after = built._unwrapped_model.state_dict()
        assert all(torch.equal(before[name], value) for name, value in after.items())

        best = read_checkpoint(folder / "best_checkpoint.pt", own=True)
        student = build_model(stock_model_config(best["config"]["model"]), fitted=False)
        student.load_state_dict(best["state_dict"])
        student.eval()
        expected = by_hand(built, student, (10.0, 2.0, 1.5))
        assert judged.student == pytest.approx(expected, rel=1e-4)
        frozen = Teacher.from_checkpoint(str(teacher)).model
        assert judged.teacher == pytest.approx(by_hand(built, frozen, (8.0, 3.0, 2.0)), rel=1e-4)
        assert (judged.split, judged.structures) == ("val", 4)

        lines = closing_lines(built, 754.0)
    assert len(lines) == 5
    assert lines[0] == f"Done: 8 steps. The student is {folder / 'best_checkpoint.pt'}"
    assert re.match(
        r"val \(MAE of 4 structures\): energy .* meV, forces .* meV/Å; the teacher", lines[1]
    )
    assert lines[2].startswith("It took 13 min; what the teacher said is kept in ")
    assert lines[3].startswith("Compare it: fairchem-kd compare PLAIN_RUN ")
    assert lines[4].startswith("Hand it on: fairchem-kd export ")


def test_plain_training_has_no_teacher(tmp_path: Path, data: Path) -> None:
    given = config(tmp_path, data)
    given["dataset"]["test"] = {"format": "lmdb", "src": str(write_lmdb(tmp_path / "t", 3, 9))}
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        lines = closing_lines(built, 30.0)
    assert lines[2].startswith("test (MAE of 3 structures): energy ")
    assert not any("teacher" in line for line in lines)
    assert lines[3] == "It took 30 s."
    assert lines[4].endswith("-test OTHER_RUN")


def test_no_student_is_named_where_none_was_saved(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data, eval_every=1000)) as built:
        built.train(disable_eval_tqdm=True)
        lines = closing_lines(built, 30.0)
    assert lines[0].endswith("steps. They have left no checkpoint")
    assert lines[-1] == "It took 30 s."


def test_an_end_that_cannot_be_looked_at_is_no_failure(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(config(tmp_path, data)) as built:
        built.train(disable_eval_tqdm=True)
        built._denorm_preds = None
        logging.disable(logging.NOTSET)
        with caplog.at_level(logging.INFO):
            tell_end(built)
    assert "errors could not be measured here" in caplog.records[-1].getMessage()


def test_a_teacher_that_is_no_better_is_known() -> None:
    better = Judged("val", 4, {"energy": 1.0, "forces": 1.0}, {"energy": 0.5, "forces": 2.0})
    assert not better.teacher_is_no_better
    assert Judged("val", 4, {"energy": 1.0}, {"energy": 1.2}).teacher_is_no_better
    assert not Judged("val", 4, {"energy": 1.0}, None).teacher_is_no_better
    assert str(better).endswith("the teacher's 500 meV, 2000 meV/Å (2 and 0.5 times those)")
