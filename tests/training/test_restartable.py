"""The restartable trainer by itself: no teacher, and a subclass's own state through its hooks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import assert_equal, assert_same, config, trained, trainer, weights
from trainings import data as data

from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.training.records import read_records
from fairchem_kd.training.restartable import RestartableTrainer
from fairchem_kd.training.resume import STATE_KEY


class Counting(RestartableTrainer):
    """Counts its forwards in training, noisily: a state that has to be saved and gone on from."""

    def __init__(self, **stock: Any) -> None:
        self.order: list[str] = []
        self.noise = torch.zeros(())
        super().__init__(**stock)

    def set_up(self) -> None:
        self.order.append("set_up")

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        self.order.append("load")
        if state is None:
            raise UserError("this run was not started by Counting.")
        self.noise = state["noise"]

    def own_state(self) -> dict[str, Any]:
        return {"noise": self.noise}

    def run_model(self, batch: Any) -> dict[str, torch.Tensor]:
        if self.model.training:
            self.noise = self.noise + torch.rand(())
        return super().run_model(batch)

    def values(self) -> dict[str, float]:
        return {"noise": self.noise.item()}


class Keeping(Counting):
    """Keeps a copy of every step's checkpoint, as a run killed right after it would leave it."""

    def save(self, *args: Any, **kwargs: Any) -> str | None:
        path = super().save(*args, **kwargs)
        if path is not None and path.endswith("/checkpoint.pt"):
            shutil.copy(path, Path(path).with_name(f"step{self.step}.pt"))
        return path


def test_it_trains_as_stock_does(tmp_path: Path, data: Path) -> None:
    ours = trained(config(tmp_path / "ours", data), RestartableTrainer)
    assert_equal(ours, trained(config(tmp_path / "stock", data), OCPTrainer))


def test_own_state_survives_a_kill_at_any_step(tmp_path: Path, data: Path) -> None:
    arguments = config(tmp_path, data, checkpoint_every=1)
    with trainer(arguments, Keeping) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        assert built.order == ["set_up"]
    expected = read_checkpoint(folder / "checkpoint.pt")
    values = [record["metrics"]["noise"] for record in read_records(folder, "train")]
    assert values == sorted(values)
    assert values[0] > 0
    for step in (1, 3, 4, 6):
        run = folder.with_name(f"resumed{step}")
        run.mkdir()
        shutil.copy(folder / f"step{step}.pt", run / "checkpoint.pt")
        with trainer(arguments, Counting, timestamp_id=run.name) as resumed:
            torch.manual_seed(step)  # another process has another random state
            resumed.train(disable_eval_tqdm=True)
            assert resumed.order == ["set_up", "load"]
        ended = read_checkpoint(run / "checkpoint.pt")
        for key in ("state_dict", "optimizer", "ema", STATE_KEY, "scheduler"):
            assert_same(ended[key], expected[key], f"step {step}: {key}")


def test_a_state_that_is_not_its_own_is_refused(tmp_path: Path, data: Path) -> None:
    arguments = config(tmp_path, data, max_epochs=1)
    with trainer(arguments, RestartableTrainer) as built:
        built.train(disable_eval_tqdm=True)
        built.save()
        name = built.timestamp_id
    with (
        trainer(arguments, Counting, timestamp_id=name) as resumed,
        pytest.raises(UserError, match="not started by Counting"),
    ):
        resumed.train(disable_eval_tqdm=True)


def test_outputs_that_say_no_more_than_a_level_are_stocks_usual_ones(
    tmp_path: Path, data: Path
) -> None:
    """Without them a step of stock ends in a KeyError, and its checkpoint would too."""
    given = config(tmp_path, data, max_epochs=1)
    expected = trained(given, OCPTrainer)
    given["outputs"] = {"energy": {}, "forces": {"level": "atom"}}
    with trainer(given, RestartableTrainer) as built:
        built.train(disable_eval_tqdm=True)
        assert_equal(expected, weights(built))
        saved = read_checkpoint(Path(built.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt")
    assert saved["config"]["outputs"]["forces"]["eval_on_free_atoms"] is True
    assert saved["config"]["outputs"]["energy"]["level"] == "system"
