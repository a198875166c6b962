"""A sweep for real: workers of this machine, killed in mid-run and gone on with; and SLURM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, assert_same_end, wait_until
from trainings import write_sweep_base

from fairchem_kd.commands.main import main
from fairchem_kd.errors import UserError
from fairchem_kd.sweep.local import Machine
from fairchem_kd.sweep.manifest import Manifest, expand, read_manifest
from fairchem_kd.sweep.state import read_state, state_path, statuses
from fairchem_kd.training.records import read_records

SWEEP = {
    "base": "base.yml",
    "seeds": [0, 1],
    "grid": {"task.distillation.losses.n2n.coefficient": [1, 10]},
}
EPOCHS = 10  # of two steps


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base config with a small teacher and small data, and a sweep over it: 2 x 2 runs."""
    folder = tmp_path_factory.mktemp("workplace")
    write_sweep_base(folder, EPOCHS)
    (folder / "sweep.yml").write_text(yaml.safe_dump(SWEEP))
    return folder


def counts(manifest: Manifest) -> dict[str, int]:
    found = [status.state for status in statuses(manifest).values()]
    return {state: found.count(state) for state in set(found)}


@pytest.mark.slow
def test_interrupted_and_resumed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    run = ["sweep", "run", "sweep.yml", "--workers", "2", "--threads", "1"]
    folder = workplace / "runs/sweeps/sweep"

    def launched(words: list[str], **how: Any) -> Command:
        return Command(words, workplace, workplace / "launcher.log", of="fairchem-kd", **how)

    def said_by(launcher: Command, code: int) -> str:
        assert launcher.wait() == code, launcher.log.read_text()
        text = launcher.log.read_text()
        launcher.log.unlink()
        return text

    # the launcher is killed, without a chance to tell its workers, which are in mid-run
    launcher = launched(run, held_at=6)
    wait_until(
        lambda: len(list(folder.glob("checkpoints/*/checkpoint.pt"))) == 2 or not launcher.running,
        "the first checkpoints",
    )
    launcher.kill()
    manifest = read_manifest(folder)
    wait_until(lambda: "running" not in counts(manifest), "the workers' end by themselves")
    assert counts(manifest) == {"failed": 2, "pending": 2}
    launcher.log.unlink()
    half_done = sorted(folder.glob("checkpoints/*/checkpoint.pt"))[0].parent
    [begun] = [one for one in manifest.runs if one.name == half_done.name]
    reason = statuses(manifest)[begun.name].reason
    assert reason.startswith("killed")
    assert "goes on from its last checkpoint (it had come to epoch" in reason

    # one worker is killed; the others go on, and the half-done run from where it was
    victim = manifest.runs[-1]
    launcher = launched(run, held_at=3, held_run=victim.name)
    noted = wait_until(
        lambda: read_state(manifest, victim) or not launcher.running, "the last run's start"
    )
    os.kill(noted["pid"], signal.SIGKILL)
    out = said_by(launcher, 1)
    assert "0 done, 0 running, 2 failed, 2 pending; 4 to run" in out
    assert f"{victim.name} FAILED: killed by SIGKILL (out of memory?)" in out
    assert counts(manifest) == {"done": 3, "failed": 1}
    log_text = manifest.output_path(begun).read_text()
    assert "Loading checkpoint from" in log_text
    steps = [r["step"] for r in read_records(half_done, "config")]
    assert steps[0] == 0 < steps[-1]  # it did go on, not start again
    assert "OMP_NUM_THREADS" not in log_text

    # only what failed is run, and then nothing
    finished = {one.name: state_path(manifest, one).stat().st_mtime_ns for one in manifest.runs}
    out = said_by(launched(run), 0)
    assert "3 done, 0 running, 1 failed, 0 pending; 1 to run" in out
    assert counts(manifest) == {"done": 4}
    for one in manifest.runs:
        same = state_path(manifest, one).stat().st_mtime_ns == finished[one.name]
        assert same == (one is not victim and one.name != victim.name)
        last = read_records(manifest.run_folder(one), "val")[-1]
        assert last["epoch"] == EPOCHS
    assert main(run) == 0
    assert "4 done, 0 running, 0 failed, 0 pending; 0 to run" in capsys.readouterr().out
    assert main(["sweep", "status", "sweep.yml"]) == 0
    assert capsys.readouterr().out.endswith("4 done, 0 running, 0 failed, 0 pending\n")

    # what was killed twice, and gone on with, is what it would have been
    point = {"base": "base.yml", "seeds": [begun.seed], "points": [begun.values]}
    Path("one.yml").write_text(yaml.safe_dump(point))
    one = launched([*run[:2], "one.yml", "--out", "undisturbed", "--threads", "1"])
    assert "1 of 1 runs done" in said_by(one, 0)
    assert_same_end(half_done, Path("undisturbed/checkpoints") / begun.name)

    assert main(["sweep", "collect", "sweep.yml"]) == 0
    table = capsys.readouterr().out
    assert "| 1 | 2 | " in table
    assert "| 10 | 2 | " in table
    assert (folder / "results.png").is_file()

    # one more value: one point more, with its two seeds
    more = {**SWEEP, "grid": {key: [1, 10, 30] for key in SWEEP["grid"]}}
    Path("sweep.yml").write_text(yaml.safe_dump(more))
    assert main([*run, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert table.count(" done") == 4
    assert table.count("pending: not started") == 2


@pytest.mark.slow
def test_a_run_that_cannot_work_fails_with_its_reason(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bad = {"base": "base.yml", "points": [{"task.distillation.teacher.checkpoint": "gone.pt"}]}
    Path("bad.yml").write_text(yaml.safe_dump(bad))
    assert main(["sweep", "run", "bad.yml"]) == 1
    assert "0 of 1 runs done" in capsys.readouterr().out
    assert main(["sweep", "status", "bad.yml"]) == 0
    assert "teacher.checkpoint: The checkpoint gone.pt does not exist" in capsys.readouterr().out


def test_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    machine = Machine(gpus=2)
    assert (machine.workers, machine.threads) == (4, 3)
    assert machine.environment(3)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert machine.environment(0)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Machine().environment(1)["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    with pytest.raises(UserError, match=r"--workers 3 with 1 GPUs each.*at most 2"):
        Machine(3)
    with pytest.raises(UserError, match="--num-gpus is 4, but this machine has 2"):
        Machine(gpus=4)
    machine = Machine(3, cpu=True)
    assert (machine.workers, machine.threads) == (3, 8)
    assert machine.arguments == ["--num-gpus", "1", "--cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Machine().workers == 1


@pytest.mark.slow
def test_submitted_without_a_scheduler(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through submitit's local executor, one at a time; one of the two cannot work."""
    from fairchem_kd.sweep.submit import Request, submit

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    points = {"good": {"optim.max_epochs": 1}, "bad": {"task.distillation.losses.n2n.student": "x"}}
    Path("both.yml").write_text(yaml.safe_dump({"base": "base.yml", "points": points}))
    manifest = expand(Path("both.yml"))
    request = Request(cpu=True, parallel=1, memory=2, hours=1, print_every=1)
    failed = submit(manifest, manifest.runs, request, cluster="local")
    by_label = {run.label: run for run in manifest.runs}
    good, bad = by_label["good"], by_label["bad"]
    assert failed == [bad]
    found = statuses(manifest)
    assert found[good.name].state == "done"
    assert found[bad.name].state == "failed"
    assert "losses.n2n.student" in found[bad.name].reason
    assert [r["step"] for r in read_records(manifest.run_folder(good), "train")] == [1, 2]
