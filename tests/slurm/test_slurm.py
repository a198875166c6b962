"""``fairchem main --submit`` on a real SLURM, of four nodes, started for this."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import (
    Command,
    assert_same_end,
    run_argv,
    steps,
    wait_until,
    write_run,
)

from fairchem_kd.launch.submission import Executor

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

#: SLURM takes its time to interrupt a job, in which a fast machine takes many steps.
LAST_STEP = 80
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Submits runs of one config from a folder, and asks SLURM about them."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        self.root, self.env = root, env

    def argv(self, name: str, *more: str, ranks: int = 1) -> list[str]:
        return run_argv(
            ranks,
            *("--identifier", name, "--run-dir", str(self.root), "--logdir", f"logs/{name}"),
            *("--submit", "--slurm-mem", "2", "--slurm-timeout", "1", *more),
            last_step=LAST_STEP,
        )

    def submit(self, name: str, *more: str, ranks: int = 1) -> Command:
        """The command that submits it."""
        argv = self.argv(name, *more, ranks=ranks)
        return Command(argv, self.root, self.root / f"{name}.log", **self.env)

    def jobs(self, name: str, command: Command) -> list[str]:
        command.finish()
        said = re.search(r"Submitted jobs: ([\d_, ]+)", (self.root / f"{name}.log").read_text())
        assert said is not None
        return said.group(1).strip().split(", ")

    def ask(self, *argv: str) -> str:
        env = {**os.environ, **self.env}
        return subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout

    def show(self, job: str) -> dict[str, str]:
        said = self.ask("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for_end(self, job: str) -> dict[str, str]:
        return wait_until(
            lambda: (shown := self.show(job))["JobState"] in ENDED and shown, f"job {job}", 0.5
        )

    def folder(self, name: str) -> Path:
        """A run's only folder."""
        (found,) = self.root.glob(f"checkpoints/*-{name}")
        return found

    def last_step(self, name: str) -> int:
        """How far a run has come."""
        folders = list(self.root.glob(f"checkpoints/*-{name}"))
        return max(steps(folders[0]), default=0) if folders else 0

    def said(self, name: str) -> str:
        return "".join(path.read_text() for path in self.root.glob(f"logs/{name}/*/*_log.*"))


@pytest.fixture(scope="module")
def cluster(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Where the config and its data are."""
    root = tmp_path_factory.mktemp("slurm")
    yml = write_run(root, LAST_STEP)
    contents = yaml.safe_load(yml.read_text())
    yml.write_text(yaml.safe_dump({**contents, "slurm": {"comment": "from-the-config"}}))
    return Cluster(root, slurm)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, list[str]]:
    """All jobs, at work side by side, two of them interrupted in mid-run."""
    grid = {"optim": {"lr_initial": [1e-3, 2e-3]}}
    (cluster.root / "grid.yml").write_text(yaml.safe_dump(grid))
    missing = "--task.distillation.teacher.checkpoint=missing.pt"
    commands = {
        "interrupted": cluster.submit("interrupted", "--num-gpus", "2", ranks=2),
        "killed": cluster.submit("killed"),
        "one": cluster.submit("one"),
        "two": cluster.submit("two", "--num-gpus", "2", ranks=2),
        "failing": cluster.submit("failing", missing),
        "array": cluster.submit("array", "--sweep-yml", "grid.yml"),
        "nodes": cluster.submit("nodes", "--num-nodes", "2", ranks=2),
        "preempted": cluster.submit("preempted", "--slurm-partition", "low"),
    }
    submitted = {name: cluster.jobs(name, command) for name, command in commands.items()}
    important = ("sbatch", "--partition=high", "--exclusive", "--output=important.log")
    to_be_done = {
        "interrupted": ("scancel", "--signal=USR2", *submitted["interrupted"]),
        "killed": ("scancel", "--signal=KILL", *submitted["killed"]),
        "preempted": (*important, f"--chdir={cluster.root}", "--wrap=sleep 1"),
    }

    def all_done() -> bool:
        for name, command in list(to_be_done.items()):
            if cluster.last_step(name) >= 4:
                cluster.ask(*command)
                del to_be_done[name]
        return not to_be_done

    wait_until(all_done, f"the fourth steps of {to_be_done}")
    return submitted


def test_told_to_leave_ahead_of_a_time_out(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    """Two ranks save at the same step, the job requeues itself, and no step is taken twice."""
    (job,) = jobs["interrupted"]
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert "Requeued job" in cluster.said("interrupted")
    assert "Traceback" not in cluster.said("interrupted")
    assert steps(cluster.folder("interrupted")) == list(range(1, LAST_STEP + 1))
    cluster.wait_for_end(jobs["two"][0])
    assert_same_end(cluster.folder("interrupted"), cluster.folder("two"))


def test_preempted(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    """By a job that takes the whole node: it makes room, and goes on when that has ended."""
    (job,) = jobs["preempted"]
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert (cluster.root / "important.log").is_file()
    assert "Requeued job" in cluster.said("preempted")
    assert steps(cluster.folder("preempted")) == list(range(1, LAST_STEP + 1))
    cluster.wait_for_end(jobs["one"][0])
    assert_same_end(cluster.folder("preempted"), cluster.folder("one"))


def test_killed_and_requeued(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    """As after a node's failure: it starts again, and goes on in its own folder."""
    (job,) = jobs["killed"]
    ended = cluster.wait_for_end(job)
    assert ended["JobState"] in ("FAILED", "CANCELLED")  # which one depends on the version
    assert max(steps(cluster.folder("killed"))) < LAST_STEP
    cluster.ask("scontrol", "requeue", job)
    wait_until(lambda: cluster.show(job)["JobState"] not in ENDED, "the requeue")
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    cluster.wait_for_end(jobs["one"][0])
    assert_same_end(cluster.folder("killed"), cluster.folder("one"))


def test_one_job(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    ended = cluster.wait_for_end(jobs["one"][0])
    assert ended["JobState"] == "COMPLETED", cluster.said("one")
    assert ended["Comment"] == "from-the-config"
    assert "gpu" not in ended["TRES"]
    assert steps(cluster.folder("one")) == list(range(1, LAST_STEP + 1))


def test_two_ranks(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    ended = cluster.wait_for_end(jobs["two"][0])
    assert ended["JobState"] == "COMPLETED", cluster.said("two")
    assert "node=1" in ended["TRES"]
    assert steps(cluster.folder("two")) == list(range(1, LAST_STEP + 1))


def test_two_nodes(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    """The same ranks, one on each of two nodes."""
    ended = cluster.wait_for_end(jobs["nodes"][0])
    assert ended["JobState"] == "COMPLETED", cluster.said("nodes")
    assert "node=2" in ended["TRES"]
    cluster.wait_for_end(jobs["two"][0])
    assert_same_end(cluster.folder("nodes"), cluster.folder("two"))


def test_a_failing_job_is_reported_as_failed(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    ended = cluster.wait_for_end(jobs["failing"][0])
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert "missing.pt does not exist" in cluster.said("failing")
    assert not list(cluster.folder("failing").glob("*checkpoint.pt"))


def test_a_sweep_is_an_array(cluster: Cluster, jobs: dict[str, list[str]]) -> None:
    first, second = jobs["array"]
    assert first.removesuffix("_0") == second.removesuffix("_1")
    for number, job in enumerate((first, second)):
        ended = cluster.wait_for_end(job)
        assert ended["JobState"] == "COMPLETED", cluster.said("array")
        folder = cluster.folder(f"array_run{number}")
        assert steps(folder) == list(range(1, LAST_STEP + 1))


def test_ranks_get_their_gpus(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes; what ranks make of these variables is tested without SLURM."""
    for key, value in cluster.env.items():
        monkeypatch.setenv(key, value)
    executor = Executor(cluster.root / "gpus" / "%j")
    executor.update_parameters(
        name="gpus",
        mem_gb=1,
        timeout_min=5,
        nodes=2,
        tasks_per_node=2,
        gpus_per_node=2,
        cpus_per_task=3,
        slurm_partition="gpu",
    )

    def seen() -> tuple[str | None, ...]:
        names = ("NODEID", "LOCALID", "PROCID", "CPUS_PER_TASK")
        step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        shown = subprocess.check_output(["scontrol", "show", "step", step], text=True)
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (*[os.environ[f"SLURM_{name}"] for name in names], devices, "cpu=12" in shown)

    found = executor.submit(seen).results()
    ranks = [("0", "0", "0"), ("0", "1", "1"), ("1", "0", "2"), ("1", "1", "3")]
    assert found == [(*rank, "3", "0,1", True) for rank in ranks]


def test_a_job_of_sixteen_gpus_is_taken(cluster: Cluster) -> None:
    """And held, since they are not there."""
    more = ("--num-nodes", "2", "--num-gpus", "8", "--slurm-partition", "gpu", "--slurm.hold=True")
    argv = [word for word in cluster.argv("sixteen", *more) if word != "--cpu"]
    command = Command(argv, cluster.root, cluster.root / "sixteen.log", **cluster.env)
    (job,) = cluster.jobs("sixteen", command)
    shown = cluster.show(job)
    assert shown["JobState"] == "PENDING"
    assert (shown["NumNodes"], shown["NumTasks"], shown["CPUs/Task"]) == ("2-2", "16", "1")
    assert (shown["TresPerNode"], shown["Requeue"]) == ("gres:gpu:8", "1")
    cluster.ask("scancel", job)


def test_a_refused_job_is_a_sentence(cluster: Cluster) -> None:
    command = cluster.submit("refused", "--slurm.no_such_option=1")
    assert command.wait() == 2
    said = (cluster.root / "refused.log").read_text().splitlines()
    assert "error: the scheduler refused the job: " in said[-1]
    assert "no-such-option" in said[-1]
    assert "Traceback" not in said
