"""``fairchem-kd teach --submit``: the parts of a store as an array of jobs, through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submitit import Job
from submitit.helpers import Checkpointable, DelayedSubmission

from fairchem_kd.commands.main import main
from fairchem_kd.launch.submission import Executor, refusals_told

#: Where jobs leave their logs, in the current folder.
FOLDER = "teach_jobs"
#: How often a job may run into its time limit and be queued again.
TIMEOUTS = 100


@dataclass(frozen=True)
class Request:
    """What is asked of the scheduler."""

    parts: int
    parallel: int
    cpu: bool  #: no GPU for each job
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: int = 80  # GB
    hours: float = 72.0


class TeachJob(Checkpointable):
    """One part; queued again, it goes on where it was, for what is kept is not asked again."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, words: Sequence[str]) -> None:
        """Run the command ``fairchem-kd WORDS``.

        Raises:
            RuntimeError: it failed; its own words are in the log.
        """
        os.chdir(self.directory)
        code = main(list(words))
        if code != 0:
            raise RuntimeError(f"fairchem-kd {' '.join(words)} ended with {code}")

    def checkpoint(self, words: Sequence[str]) -> DelayedSubmission:
        """Called by submitit before the job is queued again."""
        return DelayedSubmission(TeachJob(self.directory), words)


def submit(
    words: Sequence[str],
    request: Request,
    slurm: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    cluster: str | None = None,
) -> list[Job[None]]:
    """Submit ``fairchem-kd WORDS --part I/N`` as one array; returns the jobs that failed.

    Without a scheduler they run here, ``request.parallel`` at a time, and this waits for them;
    of SLURM's it is not known yet.

    Args:
        slurm: the ``slurm`` block of a config.
        cluster: ``slurm`` or ``local`` in place of what is found.

    Raises:
        UserError: the scheduler refuses the jobs.
    """
    executor = Executor(
        f"{FOLDER}/%j", cpu=request.cpu, cluster=cluster, slurm_max_num_timeout=TIMEOUTS
    )
    executor.update_parameters(
        name="teach",
        mem_gb=request.memory,
        timeout_min=round(request.hours * 60),
        gpus_per_node=1,
        cpus_per_task=1,
        tasks_per_node=1,
        nodes=1,
        slurm_array_parallelism=request.parallel,
        slurm_partition=request.partition,
        slurm_account=request.account,
        slurm_qos=request.qos,
        slurm_additional_parameters=dict(slurm or {}),
    )
    parts = [[*words, "--part", f"{part + 1}/{request.parts}"] for part in range(request.parts)]
    job = TeachJob(os.getcwd())
    with refusals_told(1, executor):
        if executor.is_local:
            say(f"no scheduler here: as processes, {request.parallel} at a time; logs in {FOLDER}")
            return _run_through(executor, job, parts, request.parallel, say)
        with executor.batch():
            jobs = [executor.submit(job, part) for part in parts]
    first, last = jobs[0].job_id, jobs[-1].job_id
    say(f"{request.parts} parts are the jobs {first} to {last}; logs in {FOLDER}")
    return []


def _run_through(
    executor: Executor,
    job: TeachJob,
    parts: Sequence[Sequence[str]],
    parallel: int,
    say: Callable[[str], None],
) -> list[Job[None]]:
    """Feed the local executor, which starts whatever it is given at once."""
    waiting = [*parts]
    going: list[Job[None]] = []
    failed: list[Job[None]] = []
    while waiting or going:
        while waiting and len(going) < parallel:
            going.append(executor.submit(job, waiting.pop(0)))
        time.sleep(0.2)
        for ended in [one for one in going if one.done()]:
            going.remove(ended)
            if ended.exception() is not None:
                failed.append(ended)
                say(f"{_reason(ended)}; see {ended.paths.stderr}")
    return failed


def _reason(job: Job[None]) -> str:
    """What the command said was wrong."""
    lines = [line for line in (job.stderr() or "").splitlines() if line.startswith("error: ")]
    return lines[-1].rstrip(".") if lines else "a part failed"
