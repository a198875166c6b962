"""Trainings with ``task.soft_lengths``: their files, and how they begin, go on and are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from models import batch, structures
from trainings import assert_equal, config, interrupted, trained, trainer, write_yaml
from trainings import data as data

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.errors import UserError
from fairchem_kd.models.build import build_model
from fairchem_kd.models.file import read_checkpoint

BITS = 2**10  #: of a softness of 0.1


def soft(root: Path, data: Path, given: Any = 0.1, **more: Any) -> dict[str, Any]:
    """A conservative PaiNN's."""
    arguments = config(root, data, model="painn_energy", **more)
    arguments["task"] |= {"conservative": True, "soft_lengths": given}
    return arguments


def parameters(built: Any) -> dict[str, torch.Tensor]:
    named = built._unwrapped_model.named_parameters()
    return {k: v.detach().clone() for k, v in named if v.requires_grad}


def test_files_are_stocks_and_say_what_the_training_evaluated(tmp_path: Path, data: Path) -> None:
    with trainer(soft(tmp_path / "a", data, checkpoint_every=8)) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        sample = batch(structures(2))
        model = built._unwrapped_model.eval()
        raw = model(sample)["energy"].detach()
        with torch.no_grad():
            built.ema.copy_to()
        averaged = model(sample)["energy"].detach()
        trained_size = built._unwrapped_model.update_layers[0].vec_proj.weight.abs().max()
    contents = read_checkpoint(folder / "checkpoint.pt")
    assert contents["config"]["task"]["soft_lengths"] == 0.1
    # stock's own trainer, which knows nothing of the key, has the same model
    with trainer(config(tmp_path / "b", data, model="painn_energy"), OCPTrainer) as stock:
        stock.load_checkpoint(str(folder / "checkpoint.pt"), contents)
        bare = stock._unwrapped_model.eval()
        assert torch.equal(bare(sample)["energy"], raw)
        update = bare.update_layers[0]
        size = update.vec_proj.weight[update.hidden_channels :].abs().max()
        assert size < 10 * trained_size / BITS
        stock.ema.copy_to()
        assert torch.equal(bare(sample)["energy"], averaged)
    # and so has everything that reads a checkpoint
    assert torch.equal(build_model(contents, "it")(sample)["energy"].detach(), averaged)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, data: Path) -> None:
    whole = trained(soft(tmp_path / "whole", data))
    arguments = soft(tmp_path / "parts", data, checkpoint_every=2)
    run = interrupted(arguments, step=4)
    assert_equal(trained({**arguments, "timestamp_id": run}), whole)


def test_from_weights_without_they_are_softened_at_the_start_and_not_before(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a training with direct forces; what is loaded is evaluated as it is."""
    with trainer(config(tmp_path / "first", data, model="painn")) as built:
        built.ema.shadow_params[0].mul_(1.5)  # averages are not the weights
        path = built.save(checkpoint_file="checkpoint.pt")
        averages = dict(zip(parameters(built), built.ema.shadow_params, strict=True))
    sample = batch(structures(2))
    expected = build_model(read_checkpoint(Path(path)), path)(sample)["energy"].detach()
    with trainer(soft(tmp_path / "second", data)) as built:
        built.load_checkpoint(path)
        found = built._unwrapped_model.eval()(sample)["energy"].detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        seen: list[dict[str, torch.Tensor]] = []
        built.check_labels = lambda: seen.append(parameters(built))
        logging.disable(logging.NOTSET)
        with caplog.at_level(logging.INFO):
            built.train(disable_eval_tqdm=True)
        assert "had no softness, and get 0.1" in caplog.text
        assert built.step == built.last_step
        last = built.save(checkpoint_file="checkpoint.pt")
    # the numbers that are trained are those that were
    for name, value in seen[0].items():
        if "rbf_proj.bias" not in name:
            assert torch.equal(value, averages[name]), name
    # from those on, nothing is softened
    with trainer(soft(tmp_path / "third", data)) as built:
        built.load_checkpoint(last)
        before = parameters(built)
        built.check_labels = lambda: seen.append(parameters(built))
        built.train(disable_eval_tqdm=True)
    assert_equal(seen[1], before)
    # and without the key they are no start, but can be evaluated
    without = soft(tmp_path / "fourth", data)
    del without["task"]["soft_lengths"]
    with trainer(without) as built:
        built.load_checkpoint(last)
        assert built.validate()["forces_mae"]["metric"] > 0
        with pytest.raises(UserError, match=r"set task\.soft_lengths: 0\.1"):
            built.train(disable_eval_tqdm=True)


def test_a_model_without_such_vectors_is_refused(tmp_path: Path, data: Path) -> None:
    arguments = config(tmp_path, data, model="schnet")
    arguments["task"]["soft_lengths"] = 0.1
    with pytest.raises(UserError, match="SchNetWrap has none"), trainer(arguments):
        pass


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task.soft_lengths=0.1", "--trainer=ocp"], "the trainer is 'ocp'"),
        (["--task.soft_length=0.1"], "did you mean 'soft_lengths'?"),
        (["--task.soft_lengths=true"], "task.soft_lengths must be a number"),
        (["--task.soft_lengths=3"], "task.soft_lengths must be at most 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    arguments = config(tmp_path, Path("nowhere"), model="painn_energy")
    path = write_yaml(tmp_path / "run.yml", arguments)
    assert fairchem(["--mode", "train", "--config-yml", str(path), "--cpu", *words]) == 2
    assert told in capsys.readouterr().err
