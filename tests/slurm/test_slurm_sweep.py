"""``fairchem-kd sweep run --submit`` on a real SLURM: an array, cancelled and told to leave."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from commands import wait_until
from trainings import write_sweep_base

from fairchem_kd.commands.main import main
from fairchem_kd.sweep.manifest import Manifest, Run, read_manifest
from fairchem_kd.sweep.state import DONE, FAILED, PENDING, RUNNING, read_state, statuses
from fairchem_kd.training.records import read_records

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

EPOCHS = 100  # long enough to be interrupted on any machine
RUN = ["sweep", "run", "sweep.yml", "--print-every", "1", "--submit", "--cpu"]
RUN += ["--slurm-mem", "2", "--slurm-timeout", "1"]


@pytest.fixture
def workplace(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Manifest]:
    """A sweep of 2 coefficients x 2 seeds; gives its manifest once there is one."""
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    write_sweep_base(tmp_path, EPOCHS)
    sweep = {
        "base": "base.yml",
        "seeds": [0, 1],
        "grid": {"task.distillation.losses.n2n.coefficient": [1, 10]},
    }
    Path("sweep.yml").write_text(yaml.safe_dump(sweep))
    return lambda: read_manifest(tmp_path / "runs/sweeps/sweep")


def ended(manifest: Manifest) -> bool:
    """Whether nothing runs or waits, and so it still is after a while.

    Between two states of a job that is queued again, SLURM may know nothing of it.
    """
    for _ in range(2):
        if {RUNNING, PENDING} & counts(manifest).keys():
            return False
        if set(counts(manifest)) == {DONE}:
            return True
        time.sleep(10)
    return True


def counts(manifest: Manifest) -> Counter[str]:
    return Counter(status.state for status in statuses(manifest).values())


def wait_for_checkpoint(manifest: Manifest, run: Run) -> str:
    """The run's job, once it has come so far."""
    path = manifest.run_folder(run) / "checkpoint.pt"
    wait_until(
        lambda: path.exists() or read_state(manifest, run).get("state") == FAILED, f"{path}", 0.2
    )
    assert path.exists(), statuses(manifest)[run.name]
    return read_state(manifest, run)["job"]


@pytest.fixture
def scancel() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts it; where a task of an array has left meanwhile, it goes on trying for minutes."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["scancel", *argv]))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_an_array_is_interrupted_and_gone_on_with(
    workplace: Callable[[], Manifest],
    scancel: Callable[..., subprocess.Popen[bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*RUN, "--array-parallelism", "2"]) == 0
    assert capsys.readouterr().out.count(" is job ") == 4
    manifest = workplace()
    first, second, *_ = manifest.runs
    jobs = [read_state(manifest, run)["job"] for run in manifest.runs]
    assert len({job.partition("_")[0] for job in jobs}) == 1  # one array

    # as ahead of a time-out: it saves, is queued again, and goes on
    told = scancel("--signal=USR2", wait_for_checkpoint(manifest, first))
    # cancelled: gone, with no chance to note it
    cancelled = wait_for_checkpoint(manifest, second)
    scancel("--signal=KILL", cancelled)
    wait_until(lambda: statuses(manifest)[second.name].state == FAILED, "the kill", 0.2)
    assert "goes on from its last checkpoint" in statuses(manifest)[second.name].reason
    # the next start of the first one, which listens only later, must not be told as well
    wait_until(lambda: read_state(manifest, first)["state"] != RUNNING, "the first's leaving", 0.2)
    told.kill()

    # again: what is in the scheduler's hands stays there
    capsys.readouterr()
    assert main(RUN) == 0
    out = capsys.readouterr().out
    assert "; 1 to run" in out
    assert f"{second.name} is job " in out
    wait_until(lambda: ended(manifest), "the end of all", 0.2)
    assert counts(manifest) == {DONE: 4}, statuses(manifest)
    steps = [record["step"] for record in read_records(manifest.run_folder(first), "train")]
    assert steps == list(range(1, len(steps) + 1))  # none twice, none left out
    starts = read_records(manifest.run_folder(first), "config")
    assert [record["step"] > 0 for record in starts] == [False, True]

    assert main(["sweep", "collect", "sweep.yml", "--no-plot"]) == 0
    table = capsys.readouterr().out
    assert "| 1 | 2 | " in table
    assert "| 10 | 2 | " in table


def test_what_fails_or_is_refused_says_why(
    workplace: Callable[[], Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"base": "base.yml", "points": [{"task.distillation.teacher.checkpoint": "gone.pt"}]}
    Path("sweep.yml").write_text(yaml.safe_dump(bad))
    assert main([*RUN, "--slurm-partition", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "error: the scheduler refused the job: " in error
    assert "partition" in error
    manifest = workplace()
    assert counts(manifest) == {PENDING: 1}
    assert main(RUN) == 0
    wait_until(lambda: counts(manifest)[FAILED] == 1, "the failure", 0.2)
    [status] = statuses(manifest).values()
    assert "gone.pt does not exist" in status.reason
    assert os.listdir(manifest.folder / "jobs")
