"""A sweep through submitit: one array of jobs on SLURM, or its local executor without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit import Job, JobEnvironment
from submitit.helpers import Checkpointable, DelayedSubmission

from fairchem_kd.errors import UserError
from fairchem_kd.launch.submission import Executor, refusals_told
from fairchem_kd.sweep.columns import titles
from fairchem_kd.sweep.job import TAKEN, claim, note_submitted
from fairchem_kd.sweep.manifest import Manifest, Run, check_config, read_manifest
from fairchem_kd.sweep.scheduler import LOCAL
from fairchem_kd.sweep.state import DONE, FAILED, PENDING, heartbeat, statuses, write_state

if TYPE_CHECKING:
    from fairchem_kd.launch.ranks import KDRunner

#: How often a job may run into its time limit and be queued again.
TIMEOUTS = 100


@dataclass(frozen=True)
class Request:
    """What each run asks of the scheduler; the flags of `fairchem --submit`."""

    gpus: int = 1
    nodes: int = 1
    cpu: bool = False
    parallel: int = 16
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: int = 80  # GB
    hours: float = 72.0
    print_every: int = 10


class SweepJob(Checkpointable):
    """What every rank of a run's job does: the launcher's own runner, and notes on how it went."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._leaving = False
        self._runner: KDRunner | None = None

    def __call__(self, config: dict[str, Any]) -> None:
        """Train the run, or go on with it."""
        from fairchem_kd.launch.ranks import KDRunner

        manifest, run = self._find()
        os.chdir(manifest.directory)
        self._runner = KDRunner()
        environment = JobEnvironment()
        if environment.global_rank != 0:
            self._runner(config)
            return
        job = _job_id(environment)
        check_config(manifest, run)
        if not claim(manifest, run, job):
            raise SystemExit(TAKEN)
        with heartbeat(manifest, run):
            try:
                self._runner(config)
            except BaseException as error:
                if not self._leaving:
                    write_state(manifest, run, FAILED, job=job, reason=_reason(error))
                raise
        write_state(manifest, run, DONE, job=job)

    def checkpoint(self, config: dict[str, Any]) -> DelayedSubmission:
        """Called by submitit on the first rank, before the job is queued again."""
        if self._runner is not None:  # else it was still being set up
            config = self._runner.checkpoint(config).args[0]
        manifest, run = self._find()
        self._leaving = True
        write_state(manifest, run, PENDING, job=_job_id(JobEnvironment()), reason="queued again")
        return DelayedSubmission(SweepJob(self.folder, self.name), config)

    def _find(self) -> tuple[Manifest, Run]:
        manifest = read_manifest(self.folder)
        [run] = [run for run in manifest.runs if run.name == self.name]
        return manifest, run


def _job_id(environment: JobEnvironment) -> str:
    return (LOCAL if environment.cluster == "local" else "") + environment.job_id


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


def job_config(manifest: Manifest, run: Run, request: Request) -> dict[str, Any]:
    """The config that `fairchem --submit` would hand to the run's job."""
    from fairchem_kd.launch.config import make_parser, read_config

    check_config(manifest, run)
    argv = manifest.command(run)[1:]
    argv += ["--submit", "--num-gpus", str(request.gpus), "--num-nodes", str(request.nodes)]
    argv += ["--print-every", str(request.print_every), *(["--cpu"] if request.cpu else [])]
    return read_config(make_parser().parse_args(argv), [])


def make_executor(
    manifest: Manifest, request: Request, config: dict[str, Any], cluster: str | None = None
) -> Executor:
    """submitit's executor for runs like the one of ``config``."""
    executor = Executor(
        manifest.folder / "jobs" / "%j",
        cpu=request.cpu,
        cluster=cluster,
        slurm_max_num_timeout=TIMEOUTS,
    )
    executor.update_parameters(
        name=f"sweep-{Path(manifest.sweep).stem}",
        mem_gb=request.memory,
        timeout_min=round(request.hours * 60),
        gpus_per_node=request.gpus,
        cpus_per_task=int((config.get("optim") or {}).get("num_workers") or 0) + 1,
        tasks_per_node=request.gpus,
        nodes=request.nodes,
        slurm_array_parallelism=request.parallel,
        slurm_partition=request.partition,
        slurm_account=request.account,
        slurm_qos=request.qos,
        slurm_additional_parameters=config.get("slurm"),
    )
    return executor


def submit(
    manifest: Manifest,
    runs: Sequence[Run],
    request: Request,
    say: Callable[[str], None] = print,
    cluster: str | None = None,
) -> list[Run]:
    """Submit ``runs`` as one array; returns those that failed, which SLURM's are not known to yet.

    Without a scheduler they run here, ``request.parallel`` at a time, and this waits for them.

    Args:
        cluster: ``slurm`` or ``local`` in place of what is found.

    Raises:
        UserError: the scheduler refuses the jobs.
    """
    configs = [job_config(manifest, run, request) for run in runs]
    os.chdir(manifest.directory)
    executor = make_executor(manifest, request, configs[0], cluster)
    for config in configs:
        config["slurm"] = {}  # of no use to the run, and stock edits its job's files by it
    if executor.is_local:
        with refusals_told(request.nodes, executor):
            waiting = list(zip(runs, configs, strict=True))
            return _run_through(executor, manifest, waiting, request, say)
    told = titles(manifest.runs)
    jobs: list[Job[None]] = []
    with refusals_told(request.nodes, executor), executor.batch():
        for run, config in zip(runs, configs, strict=True):
            jobs.append(executor.submit(SweepJob(manifest.folder, run.name), config))
    for run, job in zip(runs, jobs, strict=True):
        note_submitted(manifest, run, job.job_id)
        say(f"{run.name} is job {job.job_id}: {told[run.name]}, seed {run.seed}")
    return []


def _run_through(
    executor: Executor,
    manifest: Manifest,
    waiting: list[tuple[Run, dict[str, Any]]],
    request: Request,
    say: Callable[[str], None],
) -> list[Run]:
    """Feed the local executor, which starts whatever it is given at once."""
    say(f"no scheduler here: through submitit's local executor, {request.parallel} at a time")
    told = titles(manifest.runs)
    waiting.reverse()
    runs = [run for run, _ in waiting]
    going: list[Job[None]] = []
    while waiting or going:
        while waiting and len(going) < request.parallel:
            run, config = waiting.pop()
            job = executor.submit(SweepJob(manifest.folder, run.name), config)
            going.append(job)
            note_submitted(manifest, run, LOCAL + job.job_id)
            say(f"{run.name} is process {job.job_id}: {told[run.name]}, seed {run.seed}")
        time.sleep(0.2)
        going = [job for job in going if not job.done()]
    found = statuses(manifest)
    return [run for run in runs if found[run.name].state != DONE]
