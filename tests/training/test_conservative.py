"""Trainings whose forces are the slope of the energy, and what their checkpoints are afterwards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.trainers import OCPTrainer
from models import batch, fit_scales, structures
from trainings import (
    NORMALIZER,
    assert_equal,
    config,
    inside,
    interrupted,
    start_ranks,
    trained,
    trainer,
    write_lmdb,
    write_yaml,
)
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.analysis.compare.evaluation import evaluate
from fairchem_kd.analysis.physics.measure import check_forces
from fairchem_kd.analysis.subjects.calculators import make_calculator
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.splits import given_split, open_split
from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.commands.main import main
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.training.restartable import RestartableTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),
]


def conservative(root: Path, data: Path, model: str = "painn_energy", **more: Any) -> dict:
    arguments = config(root, data, model=model, **more)
    arguments["task"]["conservative"] = True
    return arguments


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """The run's folder of a conservative PaiNN that learned from labels, outputs and features."""
    losses = {"vanilla": {}, "n2n": {}, "e2n": {}}
    root = tmp_path_factory.mktemp("student")
    arguments = conservative(root, data, teacher=teacher, losses=losses, checkpoint_every=4)
    with trainer(arguments) as built:
        fit_scales(built.model)
        built.train(disable_eval_tqdm=True)
        return Path(built.config["cmd"]["checkpoint_dir"])


def slopes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Forces of a checkpoint along directions, and minus the differences of its energy."""
    found = check_forces(make_calculator(read_model(path)), structures(1)[0], step=0.005)
    return np.array(found.forces), np.array(found.differences)


@pytest.mark.parametrize("cls", [RestartableTrainer, DistillationTrainer])
def test_the_weights_learn_from_the_forces(tmp_path: Path, data: Path, cls: Any) -> None:
    both = conservative(tmp_path / "a", data)
    energies = conservative(tmp_path / "b", data)
    energies["loss_functions"][1]["forces"]["coefficient"] = 0
    found, other = trained(both, cls), trained(energies, cls)
    assert not torch.equal(found["out_energy.0.weight"], other["out_energy.0.weight"])


def test_the_vanilla_loss_compares_forces_that_are_slopes(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = conservative(tmp_path, data, teacher=teacher, losses={"vanilla": {}})
    with trainer(arguments) as built:
        built.set_up()
        sample = next(iter(built.train_loader))
        built.model.train()
        out = built._forward(sample)
        built._compute_loss(out, sample)
        found = built.distillation.values.read()
        said = Teacher.from_checkpoint(teacher)
        target = said.denormalized(said.forward(sample), sample)["forces"]
    off = out["forces"].detach() - target / NORMALIZER["forces"]["rmsd"]
    free = sample.fixed == 0
    expected = off[free].norm(dim=-1).mean()  # as the labels' l2mae
    assert found["vanilla.forces"] == pytest.approx(float(expected), rel=1e-3)


def test_the_checkpoint_is_stocks_for_the_energy(student: Path, tmp_path: Path, data: Path) -> None:
    path = student / "best_checkpoint.pt"
    contents = read_checkpoint(path)
    assert contents["config"]["trainer"] == "ocp"
    assert contents["config"]["task"]["conservative"] is True
    with trainer(config(tmp_path, data, model="painn_energy"), OCPTrainer) as stock:
        stock.load_checkpoint(str(path), read_checkpoint(path))
    slab = structures(1)[0]
    slab.calc = OCPCalculator(checkpoint_path=path, cpu=True, only_output=["energy"], seed=0)
    ours = make_calculator(read_model(path))
    expected = slab.get_potential_energy()
    slab.calc = ours
    assert slab.get_potential_energy() == pytest.approx(expected, abs=1e-5)


def test_in_physical_units_forces_are_the_slope(student: Path) -> None:
    forces, differences = slopes(student)
    assert np.abs(forces).max() > 0.05
    np.testing.assert_allclose(forces, differences, atol=2e-3)  # float32 over 0.01 Å


def test_as_a_frozen_model_and_in_a_comparison(student: Path, data: Path) -> None:
    file = read_model(student)
    model = load_model(file)
    assert set(model.outputs) == {"energy", "forces"}
    slab = structures(1)[0]
    sample = batch([slab])
    physical = model.denormalized(model.forward(sample), sample)
    slab.calc = make_calculator(file)
    found = physical["forces"].numpy()
    np.testing.assert_allclose(found, slab.get_forces(apply_constraint=False), atol=1e-4)
    name, settings = given_split(str(data / "val"), file.config)
    with open_split(settings, name) as split:
        evaluation = evaluate(model, split)
    assert evaluation.has_forces
    assert evaluation.metrics["forces_mae"] > 0


def test_the_student_can_teach(student: Path, tmp_path: Path, data: Path) -> None:
    path = student / "best_checkpoint.pt"
    arguments = config(tmp_path, data, model="schnet", teacher=path, losses={"vanilla": {}})
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == built.last_step


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, data: Path) -> None:
    whole = trained(conservative(tmp_path / "whole", data))
    arguments = conservative(tmp_path / "parts", data, checkpoint_every=2)
    run = interrupted(arguments, step=4)
    assert_equal(trained({**arguments, "timestamp_id": run}), whole)


@pytest.mark.parametrize("direct", ["painn", "gemnet_oc"])
def test_a_short_second_training_begins_from_direct_forces(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture, direct: str
) -> None:
    with trainer(config(tmp_path / "first", data, model=direct)) as built:
        if direct == "painn":
            built.train(disable_eval_tqdm=True)
        built.model.eval()
        sample = batch(structures(2))
        with torch.no_grad():
            if built.ema is not None:
                built.ema.copy_to()
            expected = built._forward(sample)["energy"].clone()
            layers = getattr(built._unwrapped_model, "message_layers", ())
            jumps = [layer.rbf_proj.bias.clone() for layer in layers]
        path = built.save(checkpoint_file="checkpoint.pt")
    with trainer(conservative(tmp_path / "second", data, f"{direct}_energy")) as built:
        built.load_checkpoint(path)
        assert built.step == 0
        assert built.ema is not None
        model = built._unwrapped_model.eval()
        with torch.no_grad():
            biases = [layer.rbf_proj.bias for layer in getattr(model, "message_layers", ())]
            assert not any(bias.any() for bias in biases)  # with which the energy would jump
            for bias, value in zip(biases, jumps, strict=True):
                bias.copy_(value)
            found = built._forward(sample)
            for bias in biases:
                bias.zero_()
        torch.testing.assert_close(found["energy"], expected, rtol=1e-5, atol=1e-5)
        logging.disable(logging.NOTSET)
        if direct == "painn":
            built.train(disable_eval_tqdm=True)
            assert built.step == built.last_step
            assert not any(layer.rbf_proj.bias.any() for layer in model.message_layers)


def test_another_model_is_no_start(tmp_path: Path, data: Path) -> None:
    first = config(tmp_path / "first", data, model="painn")
    first["model"]["num_layers"] = 2
    with trainer(first) as built:
        path = built.save(checkpoint_file="checkpoint.pt")
    with (
        trainer(conservative(tmp_path / "second", data)) as built,
        pytest.raises((RuntimeError, ValueError)),
    ):
        built.load_checkpoint(path)


def test_a_shifted_normaliser_is_refused_before_the_first_step(tmp_path: Path, data: Path) -> None:
    arguments = conservative(tmp_path, data)
    arguments["dataset"]["train"]["transforms"]["normalizer"]["forces"]["mean"] = 0.1
    with trainer(arguments) as built, pytest.raises(UserError, match="set that mean to 0"):
        built.train(disable_eval_tqdm=True)


def test_on_the_command_line(tmp_path: Path, data: Path) -> None:
    """Trained, evaluated, predicted with and exported, as a user would."""
    arguments = config(tmp_path, data, model="painn_energy")
    write_lmdb(tmp_path / "test", 3, seed=80)
    arguments["dataset"]["test"] = {"format": "lmdb", "src": "test"}
    write_yaml(tmp_path / "run.yml", arguments)
    common = ["--config-yml", "run.yml", "--cpu", "--task.conservative=true"]

    def fairchem(*more: str) -> None:
        Command([*common, *more], tmp_path, tmp_path / "log").finish()

    with inside(tmp_path):
        fairchem("--mode", "train", "--identifier", "cons")
        (run,) = (tmp_path / "checkpoints").glob("*-cons")
        best = str(run / "best_checkpoint.pt")
        fairchem("--mode", "predict", "--checkpoint", best, "--identifier", "said")
        (results,) = (tmp_path / "results").glob("*-said")
        said = np.load(results / "ocp_predictions.npz")
        assert said["forces"].shape[1] == 3
        assert main(["export", best, "student.pt"]) == 0
        card = json.loads((tmp_path / "student.json").read_text())
        assert card["forces"].startswith("-dE/dx")
        forces, differences = slopes(Path("student.pt"))
        np.testing.assert_allclose(forces, differences, rtol=3e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task.conservative=true", "--trainer=ocp"], "the trainer is 'ocp'"),
        (["--task.conservativ=true"], "did you mean 'conservative'?"),
        (["--task.conservative=true", "--model.regress_forces=true"], "regress_forces: false"),
        (["--task.conservative=slope"], "must be true or false"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    arguments = config(tmp_path, Path("nowhere"), model="painn_energy")
    path = write_yaml(tmp_path / "run.yml", arguments)
    assert fairchem(["--mode", "train", "--config-yml", str(path), "--cpu", *words]) == 2
    assert told in capsys.readouterr().err


def _gradients(rank: int, world: int, root: Path, data: Path) -> None:
    arguments = conservative(root / f"{world}", data)
    arguments["task"]["soft_lengths"] = 0.1
    with trainer(arguments) as built:
        built.model.train()
        slabs = structures(4)[rank * 4 // world : (rank + 1) * 4 // world]
        sample = batch(slabs)
        built._compute_loss(built._forward(sample), sample).backward()
        if rank == 0:
            found = {k: p.grad for k, p in built._unwrapped_model.named_parameters()}
            torch.save(found, root / f"{world}.pt")


@pytest.mark.slow
def test_two_ranks_learn_as_one(tmp_path: Path, data: Path) -> None:
    """Within DistributedDataParallel the second derivative reaches every weight once."""
    start_ranks(_gradients, 1, tmp_path, data)
    start_ranks(_gradients, 2, tmp_path, data)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_file_that_claims_what_its_model_is_not(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data, model="painn")) as built:
        fit_scales(built.model)
        path = built.save(checkpoint_file="direct.pt", training_state=False)
    contents = read_checkpoint(path)
    contents["config"]["task"] = {"conservative": True}
    write_checkpoint(contents, tmp_path / "claims.pt")
    with pytest.raises(UserError, match=r"claims\.pt: task\.conservative takes forces"):
        load_model(read_model(tmp_path / "claims.pt"))
