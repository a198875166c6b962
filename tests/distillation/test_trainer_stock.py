"""The stock trainer and ours: equal where nothing is distilled, with the same checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import ALL_LOSSES, FEATURE_LOSSES, assert_equal, config, trained, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.stock.trainer import with_primary_metric
from fairchem_kd.training.resume import STATE_KEY


@pytest.mark.parametrize("model", ["painn", "schnet", "gemnet_oc"])
def test_with_every_coefficient_0_training_is_stock(
    tmp_path: Path, data: Path, teacher: Path, model: str
) -> None:
    losses = {"n2n": {"coefficient": 0}, "e2n": {"coefficient": 0.0}}
    plain = {"flush_denormal": False}
    ours = config(tmp_path / "a", data, model=model, losses=losses, distillation=plain)
    ours["task"]["distillation"]["teacher"]["checkpoint"] = str(teacher)
    stock = config(tmp_path / "b", data, model=model)
    assert_equal(trained(ours), trained(stock, OCPTrainer))


def test_with_a_live_teacher_and_a_vanishing_loss_training_is_stock(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Setting up and running distillation draws no random numbers and touches no batch."""
    losses = {name: {"coefficient": 1e-30} for name in ALL_LOSSES}
    plain = {"flush_denormal": False}
    arguments = config(tmp_path / "a", data, teacher=teacher, losses=losses, distillation=plain)
    assert_equal(trained(arguments), trained(config(tmp_path / "b", data), OCPTrainer))


def test_a_checkpoint_is_a_stock_checkpoint(tmp_path: Path, data: Path, teacher: Path) -> None:
    losses = FEATURE_LOSSES
    arguments = config(tmp_path / "a", data, teacher=teacher, losses=losses, checkpoint_every=4)
    arguments["model"]["name"] = "painn_kd"
    arguments["model"]["features"] = ["node"]
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        final, ema = weights(built), [p.clone() for p in built.ema.shadow_params]
    with trainer(config(tmp_path / "b", data), OCPTrainer) as stock:
        for name in ("checkpoint.pt", "best_checkpoint.pt"):
            contents = read_checkpoint(folder / name)
            assert contents["config"]["trainer"] == "ocp"
            assert contents["config"]["model"]["name"] == "painn"
            assert "features" not in contents["config"]["model"]
            assert contents["state_dict"].keys() == final.keys()
        assert STATE_KEY not in contents
        path = folder / "checkpoint.pt"
        stock.load_checkpoint(str(path), read_checkpoint(path))
        assert_equal(weights(stock), final)
        for mine, theirs in zip(stock.ema.shadow_params, ema, strict=True):
            assert torch.equal(mine, theirs)
        stock.config["optim"]["max_epochs"] = 3
        stock.train(disable_eval_tqdm=True)  # fine-tunes: optimiser and scheduler are its own
        assert stock.step == 12


def test_fine_tuning_a_trained_student_starts_with_its_weights(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with trainer(config(tmp_path / "a", data), OCPTrainer, seed=11) as stock:
        stock.train(disable_eval_tqdm=True)
        path = stock.save(checkpoint_file="student.pt", training_state=False)
        expected = weights(stock)
    arguments = config(tmp_path / "b", data, teacher=teacher, losses={"e2n": {}})
    with trainer(arguments) as built:
        built.load_checkpoint(path)
        # EMA's weights were saved; the file has no EMA state, which stock takes as EMA switched off
        assert built.ema is not None
        trained = [p for p in built.model.parameters() if p.requires_grad]
        for shadow, weight in zip(built.ema.shadow_params, trained, strict=True):
            assert torch.equal(shadow, weight)
        assert weights(built).keys() == expected.keys()
        assert built.step == 0
        built.train(disable_eval_tqdm=True)
        assert built.step == 8


@pytest.mark.parametrize(
    ("optim", "left"),
    [
        ({"eval_every": 5}, "no checkpoint"),
        ({"eval_every": 5, "checkpoint_every": 2}, "no best_checkpoint.pt"),
        ({"eval_every": 4}, None),
    ],
)
def test_a_training_without_an_evaluation_is_warned_of(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture, optim: dict[str, int], left: str
) -> None:
    with trainer(config(tmp_path, data, max_epochs=1, **optim)) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
    assert (left is None) == ("without an evaluation" not in caplog.text)
    assert left is None or f"leaves {left}" in caplog.text
    assert (folder / "best_checkpoint.pt").exists() == (left is None)
    assert (folder / "checkpoint.pt").exists() == (left != "no checkpoint")


def test_a_primary_metric_is_found_where_none_is_given() -> None:
    """Stock fails at the first evaluation without one."""
    both = {"energy": {}, "forces": {}}
    found = with_primary_metric(None, both)
    assert found == {
        "metrics": {"energy": ["mae"], "forces": ["mae"]}, "primary_metric": "forces_mae"
    }  # fmt: skip
    given = {"metrics": {"energy": ["mae", "mse"], "forces": ["cosine_similarity"]}}
    assert with_primary_metric(given, both) == {**given, "primary_metric": "energy_mae"}
    chosen = {**given, "primary_metric": "energy_mse"}
    assert with_primary_metric(chosen, both) == chosen
    assert "primary_metric" not in given
