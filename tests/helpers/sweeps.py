"""A base config, a folder to sweep it in, and what a refused command says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from models import model_config

from fairchem_kd.commands.main import main

E2N = "task.distillation.losses.e2n"
BASE: dict[str, Any] = {
    "trainer": "fairchem_kd.DistillationTrainer",
    "model": model_config("painn"),
    "dataset": {"train": {"format": "lmdb", "src": "data/train"}},
    "task": {"distillation": {"teacher": {"checkpoint": "teacher.pt"}, "losses": {"e2n": {}}}},
    "loss_functions": [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 10}},
    ],
    "evaluation_metrics": {"metrics": {"energy": ["mae"]}, "primary_metric": "energy_mae"},
    "optim": {"lr_initial": 1e-3, "max_epochs": 2, "scheduler": "CosineAnnealingLR"},
    "logger": "tensorboard",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base config."""
    monkeypatch.chdir(tmp_path)
    Path("base.yml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def write(contents: Any, name: str = "sweep.yml") -> Path:
    path = Path(name)
    text = contents if isinstance(contents, str) else yaml.safe_dump(contents, sort_keys=False)
    path.write_text(text)
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a refused command."""
    assert main(["sweep", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
