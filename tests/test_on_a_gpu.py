"""Trainings on a CUDA device, stored and live, and the commands that look at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import ALL_LOSSES, config, trainer, weights, write_lmdb
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.commands.main import main

pytestmark = pytest.mark.gpu

RATTLE = {"copies": 0.5, "std": [0.03, 0.06], "pool": 2}


@pytest.mark.parametrize("amp", [False, True], ids=["full", "amp"])
@pytest.mark.parametrize("store", ["auto", "off"])
def test_every_loss_trains(
    tmp_path: Path, data: Path, teacher: Path, store: str, amp: bool
) -> None:
    unlabelled = {"dataset": {"format": "lmdb", "src": str(write_lmdb(tmp_path / "more", 6, 90))}}
    block: dict[str, Any] = {
        "teacher": {"checkpoint": str(teacher), "store": store},
        "losses": ALL_LOSSES,
        "rattle": RATTLE,
        "unlabelled": unlabelled,
        "validate": True,
    }
    with trainer(config(tmp_path, data, distillation=block), cpu=False, amp=amp) as built:
        assert built.device.type == "cuda"
        before = weights(built)
        built.train(disable_eval_tqdm=True)
        after = weights(built)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())


def test_the_commands_look_at_what_came_out(
    tmp_path: Path, data: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = {"teacher": {"checkpoint": str(teacher)}, "losses": {"e2n": {}}}
    with trainer(config(tmp_path, data, distillation=block), cpu=False) as built:
        built.train(disable_eval_tqdm=True)
    (student,) = map(str, tmp_path.glob("checkpoints/*/best_checkpoint.pt"))
    val = str(data / "val")
    model, seen = ["--teacher", str(teacher)], ["--data", val]
    for argv in (
        ["inspect", student],
        ["compare", student, *model, "--split", f"val={val}"],
        ["cka", "--student", student, *model, *seen],
        ["cost", student, *model, *seen, "--repeats", "2", "--batch-sizes", "1,2"],
        ["physics", student, *model, *seen, "--md-steps", "3", "--structures", "2"],
        ["export", student, str(tmp_path / "student.pt"), "--elements", "Cu", "--no-metrics"],
    ):
        out = [] if argv[0] in ("inspect", "export") else ["--out", str(tmp_path / argv[0])]
        assert main([*argv, *out]) == 0, capsys.readouterr().err
