"""A resumed training ends like one that was never interrupted, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import (
    assert_equal,
    assert_same,
    config,
    trainer,
    weights,
    write_lmdb,
    write_splits,
    write_teacher,
)
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.training.resume import STATE_KEY


class Keeping(DistillationTrainer):
    """Keeps a copy of every step's checkpoint, as a run killed right after it would leave it."""

    def save(self, *args: Any, **kwargs: Any) -> str | None:
        path = super().save(*args, **kwargs)
        if path is not None and path.endswith("/checkpoint.pt"):
            shutil.copy(path, Path(path).with_name(f"step{self.step}.pt"))
        return path


@pytest.mark.parametrize("scheduler", ["CosineAnnealingLR", "ReduceLROnPlateau"])
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    tmp_path: Path, data: Path, teacher: Path, scheduler: str
) -> None:
    losses = {"n2n": {"schedule": {"decay": "cosine"}}, "v2v": {}}
    arguments = config(
        tmp_path, data, teacher=teacher, losses=losses, scheduler=scheduler, checkpoint_every=1
    )
    arguments["optimizer"].update({"mode": "min", "factor": 0.5, "patience": 0})
    with trainer(arguments, Keeping) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        expected = read_checkpoint(folder / "checkpoint.pt")
        best = read_checkpoint(folder / "best_checkpoint.pt")
        final_rate = built.scheduler.get_lr()
    for step in (2, 3, 4, 6):  # mid-epoch; before a validation; end of an epoch; both
        run = folder.with_name(f"resumed{step}")
        run.mkdir()
        shutil.copy(folder / f"step{step}.pt", run / "checkpoint.pt")
        if step > 3:
            shutil.copy(folder / "best_checkpoint.pt", run)
        with trainer(arguments, timestamp_id=run.name) as resumed:
            torch.manual_seed(step)  # another process has another random state
            resumed.load_checkpoint(str(run / "checkpoint.pt"))
            assert resumed.step == step
            resumed.train(disable_eval_tqdm=True)
            assert resumed.scheduler.get_lr() == final_rate
        ended = read_checkpoint(run / "checkpoint.pt")
        for key in ("state_dict", "optimizer", "ema", STATE_KEY, "scheduler", "best_val_metric"):
            assert_same(ended[key], expected[key], f"step {step}: {key}")
        ended = read_checkpoint(run / "best_checkpoint.pt")
        assert_same(ended["state_dict"], best["state_dict"], f"step {step}: best")


def test_the_runs_own_checkpoint_goes_before_the_one_given(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = config(
        tmp_path, data, teacher=teacher, losses={"n2n": {}}, checkpoint_every=2, max_epochs=1
    )
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        name = built.timestamp_id
        final = weights(built)
        best = Path(built.config["cmd"]["checkpoint_dir"]) / "best_checkpoint.pt"
    with trainer(arguments, timestamp_id=name) as resumed:
        resumed.load_checkpoint(str(best))  # what --checkpoint says, in training
        resumed.train(disable_eval_tqdm=True)
        assert resumed.step == 4
        assert_equal(weights(resumed), final)
    with trainer(arguments, timestamp_id=name) as resumed:
        resumed.load_checkpoint(str(best))  # and in validation, where it is what counts
        assert_equal(weights(resumed), dict(read_checkpoint(best)["state_dict"]))


def test_a_run_never_resumes_a_folder_by_accident(tmp_path: Path, data: Path) -> None:
    names = []
    for _ in range(3):
        with trainer(config(tmp_path, data)) as built:
            names.append(built.timestamp_id)
    assert len(set(names)) == 3


def test_resuming_with_other_losses_is_refused(tmp_path: Path, data: Path, teacher: Path) -> None:
    arguments = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        name, path = built.timestamp_id, built.save()
    other = config(tmp_path, data, teacher=teacher, losses={"e2n": {}})
    with trainer(other, timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match=r"distillation\.losses: this run was started with"):
            resumed.train(disable_eval_tqdm=True)
    for change in ({"teacher": "node@1"}, {"student": "node@2"}, {"atoms": "free"}):
        same_shapes = config(tmp_path, data, teacher=teacher, losses={"n2n": change})
        with trainer(same_shapes, timestamp_id=name) as resumed:
            resumed.load_checkpoint(path)
            with pytest.raises(UserError, match=r"distillation\.losses"):
                resumed.train(disable_eval_tqdm=True)
    another = write_teacher(tmp_path / "another", data, seed=8)
    taught = config(tmp_path, data, teacher=another, losses={"n2n": {}})
    with trainer(taught, timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match=r"distillation\.teacher"):
            resumed.train(disable_eval_tqdm=True)
    with trainer(config(tmp_path, data), timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match="losses is empty"):
            resumed.train(disable_eval_tqdm=True)
    with trainer(other) as fresh:  # as --checkpoint of a new run: fresh projections
        fresh.load_checkpoint(path)
        fresh.train(disable_eval_tqdm=True)
        assert list(fresh.distillation.terms) == ["e2n"]


def test_a_newer_format_is_refused(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data)) as built:
        contents = read_checkpoint(built.save())
        contents[STATE_KEY]["format"] += 1
        with pytest.raises(UserError, match="newer fairchem-kd"):
            built.load_checkpoint("x.pt", contents)


@pytest.mark.parametrize("losses", [{"n2n": {}}, None])
def test_a_training_starts_anew_from_one_that_has_ended(
    tmp_path: Path, data: Path, teacher: Path, losses: dict[str, Any] | None
) -> None:
    """As from the weights alone, with an optimiser and a schedule of its own."""
    with trainer(config(tmp_path, data, max_epochs=1, eval_every=4)) as built:
        built.train(disable_eval_tqdm=True)
        ended = Path(built.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt"
        final = weights(built)
    arguments = config(tmp_path, data, teacher=teacher, losses=losses, max_epochs=1, eval_every=4)
    with trainer(arguments) as fresh:
        fresh._unwrapped_model.load_state_dict(final)
        fresh.train(disable_eval_tqdm=True)
        expected = weights(fresh)
    with trainer(arguments) as built:
        built.load_checkpoint(str(ended))
        assert built.step == built.last_step
        built.train(disable_eval_tqdm=True)
        assert built.step == 4
        assert_equal(weights(built), expected)
        assert (Path(built.config["cmd"]["checkpoint_dir"]) / "best_checkpoint.pt").exists()


def test_a_painn_whose_forces_are_no_gradient_of_its_energy_is_refused(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    message = "PaiNN with direct_forces: false.*task.conservative: true"
    with (
        pytest.raises(UserError, match=f"The student .* is a {message}"),
        trainer(config(tmp_path, data, model="painn_gradient")),
    ):
        pass
    wrong = write_teacher(tmp_path / "wrong", data, "painn_gradient")
    arguments = config(tmp_path, data, teacher=wrong, losses={"vanilla": {}})
    with (
        trainer(arguments) as built,
        pytest.raises(UserError, match=f"The model in .* is a {message}"),
    ):
        built.train()


def test_a_batch_without_free_atoms_is_refused_in_words(tmp_path: Path, teacher: Path) -> None:
    data = write_splits(tmp_path / "data", val=(4, 50))
    write_lmdb(data / "train", 11, seed=0, fixed=lambda fixed, _: torch.ones_like(fixed))
    with (
        trainer(config(tmp_path, data)) as built,
        pytest.raises(UserError, match=r"No atom is free .* sid .*train_on_free_atoms: false"),
    ):
        built.train()
