"""Going on from a run's own folder: old files, damaged files, full disks, other runs."""

from __future__ import annotations

import gzip
import logging
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission
from trainings import assert_same, config, trainer, weights, write_teacher
from trainings import data as data

from fairchem_kd.distillation.terms import Distillation
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.launch.ranks import KDRunner
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.training import writing
from fairchem_kd.training.records import read_records
from fairchem_kd.training.resume import STATE_FORMAT, STATE_KEY, previous_of

FORMAT_1 = Path(__file__).parent / "checkpoints" / "format1.pt.gz"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Any]:
    """Those of the run whose checkpoint is kept in format 1: PaiNN of four channels, n2n."""
    root = tmp_path_factory.mktemp("runs")
    teacher = write_teacher(root, data, "painn")
    made = config(
        root, data, teacher=teacher, losses={"n2n": {}}, checkpoint_every=3, eval_batch_size=2
    )
    made["model"].update(hidden_channels=4, num_layers=1, num_rbf=2)
    return made


@pytest.fixture(scope="module")
def run(arguments: dict[str, Any]) -> Path:
    """The folder of a run of 8 steps, saved at the third and the sixth."""
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        return Path(built.config["cmd"]["checkpoint_dir"])


@pytest.fixture
def copy(run: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with that run's checkpoints, under a name of its own."""
    folder = run.with_name(request.node.name.replace("[", "-").replace("]", ""))
    shutil.copytree(run, folder)
    return folder


def test_a_checkpoint_of_format_1_is_gone_on_from(run: Path, arguments: dict[str, Any]) -> None:
    folder = run.with_name("format1")
    folder.mkdir()
    path = folder / "checkpoint.pt"
    path.write_bytes(gzip.decompress(FORMAT_1.read_bytes()))
    contents = read_checkpoint(path)
    state = contents[STATE_KEY]
    assert (state["format"], contents["step"]) == (1, 6)
    with trainer(arguments, timestamp_id=folder.name) as built:
        built.set_up()
        # the teacher's weights are drawn anew here, and the last bits may differ
        state["distillation"]["identity"]["teacher"] = built.distillation.identity["teacher"]
    torch.save(contents, path)
    with trainer(arguments, timestamp_id=folder.name) as built:
        built.load_checkpoint(str(path))
        built.prepare()
        loaded = {k.removeprefix("module."): v for k, v in contents["state_dict"].items()}
        assert_same(weights(built), loaded, "weights")
        theirs = state["distillation"]
        assert_same(built.distillation.state_dict()["terms"], theirs["terms"], "projections")
        built.train(disable_eval_tqdm=True)
        assert built.step == 8
        built.save()
    assert read_checkpoint(path)[STATE_KEY]["format"] == STATE_FORMAT == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_the_previous_checkpoint_serves_where_the_newest_is_damaged(
    copy: Path, run: Path, arguments: dict[str, Any], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By a file system that lost what it had acknowledged: files are renamed when whole."""
    newest = copy / "checkpoint.pt"
    assert read_checkpoint(previous_of(newest))["step"] == 3
    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[: 2000 if damage == "truncated" else 0])
    (copy / ".checkpoint.pt.killed.part").write_bytes(b"half")
    with trainer(arguments, timestamp_id=copy.name) as built, caplog.at_level(logging.WARNING):
        if damage != "gone":
            built.load_checkpoint(str(newest))  # as stock does with what it finds
            assert built.step == 3
        built.train(disable_eval_tqdm=True)
    assert "Going on from the one before it" in caplog.text
    assert "with other settings" not in caplog.text
    for name in ("checkpoint.pt", "best_checkpoint.pt"):
        ended, expected = read_checkpoint(copy / name), read_checkpoint(run / name)
        for key in expected.keys() - {"config"}:
            assert_same(ended[key], expected[key], key)
    assert not list(copy.glob(".*.part"))


def test_a_full_disk_leaves_what_was_there(copy: Path, arguments: dict[str, Any]) -> None:
    before = {path.name: path.read_bytes() for path in copy.glob("*checkpoint.pt")}
    assert len(before) == 3
    with trainer(arguments, timestamp_id=copy.name) as built:
        built.load_checkpoint(str(copy / "checkpoint.pt"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writing fails half-way
        try:
            with pytest.raises(UserError, match=rf"step 6 could not .* --timestamp-id {copy.name}"):
                built.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in copy.glob("*checkpoint.pt")} == before
    assert not list(copy.glob(".*"))


def test_a_folder_of_another_model_is_refused(
    copy: Path, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(copy / "checkpoint.pt")
    other = {**arguments, "model": {**arguments["model"], "hidden_channels": 8}}
    with trainer(other, timestamp_id=copy.name) as built:
        said = rf"--timestamp-id {copy.name}: .*model\.hidden_channels: 4 there, 8 here"
        with pytest.raises(UserError, match=said):
            built.load_checkpoint(path)
    longer = {**arguments, "optimizer": {**arguments["optimizer"], "max_epochs": 3}}
    with trainer(longer, timestamp_id=copy.name) as built, caplog.at_level(logging.WARNING):
        built.load_checkpoint(path)
        built.train(disable_eval_tqdm=True)
        assert built.step == 12
    assert "optim.max_epochs: 2 there, 3 here" in caplog.text


def test_an_epoch_of_other_steps_is_refused(copy: Path, arguments: dict[str, Any]) -> None:
    """As with another number of ranks: the run would end early or late without a word."""
    path = str(copy / "checkpoint.pt")
    for batch_size, steps in ((2, 6), (6, 2)):
        optimizer = {**arguments["optimizer"], "batch_size": batch_size}
        other = {**arguments, "optimizer": optimizer}
        said = rf"--timestamp-id {copy.name}: .* had 4 steps, and would have {steps} now"
        with trainer(other, timestamp_id=copy.name) as built, pytest.raises(UserError, match=said):
            built.train()
        with trainer(other, timestamp_id=copy.name) as built:
            built.load_checkpoint(path)  # as stock does first, for an evaluation too
            built.validate(disable_tqdm=True)
            with pytest.raises(UserError, match=said):
                built.train()


def test_a_run_is_resumed_that_took_no_step_after_the_start_it_was_given(
    run: Path, arguments: dict[str, Any]
) -> None:
    """Its step and epoch are those of the other run, with other steps per epoch."""
    optimizer = {**arguments["optimizer"], "batch_size": 2, "eval_every": 1}
    other = {**arguments, "optimizer": optimizer}
    with trainer(other, timestamp_id="begun") as built:
        built.load_checkpoint(str(run / "checkpoint.pt"))
        built.set_up()
        built.save()  # as before an evaluation in which a job is told to leave
    contents = read_checkpoint(run.with_name("begun") / "checkpoint.pt")
    assert (contents["step"], contents["epoch"]) == (6, 1.5)
    with trainer(other, timestamp_id="begun") as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == 12


def test_a_run_that_has_ended_stays_as_it_is(copy: Path, arguments: dict[str, Any]) -> None:
    at_its_end = {**arguments["optimizer"], "checkpoint_every": 4}
    ended = {**arguments, "optimizer": at_its_end}
    with trainer(ended, timestamp_id=copy.name) as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == 8
    before = {path.name: path.read_bytes() for path in copy.glob("*checkpoint.pt")}
    assert read_checkpoint(copy / "checkpoint.pt")["step"] == 8
    with trainer(ended, timestamp_id=copy.name) as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == 8
    assert {path.name: path.read_bytes() for path in copy.glob("*checkpoint.pt")} == before


#: What is at work when the signals come, and the step at which the run then leaves.
MOMENTS = {
    "statistics": (Distillation, "fit_statistics", 1),
    "first step": (DistillationTrainer, "_backward", 1),
    "save": (writing, "write_checkpoint", 3),
    "evaluation": (DistillationTrainer, "_compute_metrics", 3),  # in its midst
    "best": (DistillationTrainer, "update_best", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signals", [["SIGUSR2"], ["SIGTERM", "SIGUSR2", "SIGUSR2"]])
def test_signals_at_awkward_moments(
    run: Path,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    signals: list[str],
) -> None:
    """submitit is asked to leave, and the run goes on like one that was left alone."""
    name = f"{moment}-{len(signals)}".replace(" ", "-")
    runner, requeued = KDRunner(), []
    delayed = DelayedSubmission(runner, {})
    delayed.set_timeout(60, 3)
    job = SimpleNamespace(global_rank=0, _requeue=requeued.append)
    handler = SignalHandler(job, SimpleNamespace(submitted_pickle=tmp_path / "job.pkl"), delayed)
    where, method, step = MOMENTS[moment]
    original = getattr(where, method)

    def signalled(*given: Any, **more: Any) -> Any:
        if moment != "evaluation" or runner.trainer.restart.evaluating:
            while waiting:
                os.kill(os.getpid(), getattr(signal, waiting.pop(0)))
        return original(*given, **more)

    waiting = list(signals)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]
    signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    signal.signal(signal.SIGTERM, handler.bypass)
    try:
        with monkeypatch.context() as patched, trainer(arguments, timestamp_id=name) as built:
            runner.trainer = built
            patched.setattr(where, method, signalled)
            with pytest.raises(SystemExit):
                built.train(disable_eval_tqdm=True)
            left_at = built.step
    finally:
        for number, previous in before:
            signal.signal(number, previous)
    assert not waiting
    assert requeued == [3]  # once, with as many time-outs left as before
    folder = run.with_name(name)
    assert left_at == read_checkpoint(folder / "checkpoint.pt")["step"] == step
    with trainer(arguments, timestamp_id=name) as built:
        built.train(disable_eval_tqdm=True)
    for file in ("checkpoint.pt", "best_checkpoint.pt"):
        ended, expected = read_checkpoint(folder / file), read_checkpoint(run / file)
        for key in expected.keys() - {"config"}:
            assert_same(ended[key], expected[key], f"{file}: {key}")
    assert [r["step"] for r in read_records(folder, "train")] == list(range(1, 9))


def test_a_named_folder_without_a_checkpoint_starts_from_the_beginning(
    run: Path, arguments: dict[str, Any]
) -> None:
    """That is what a run killed before its first checkpoint leaves."""
    with trainer(arguments, timestamp_id="killed") as built:
        built.train(disable_eval_tqdm=True)
    ended, expected = (
        read_checkpoint(folder / "checkpoint.pt") for folder in (run.with_name("killed"), run)
    )
    for key in expected.keys() - {"config"}:
        assert_same(ended[key], expected[key], key)
