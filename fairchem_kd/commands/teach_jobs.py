"""``fairchem-kd teach --submit``: the parts of a store as an array of jobs, through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submitit import Job

from fairchem_kd.commands import jobs
from fairchem_kd.launch.submission import Executor, refusals_told

#: Where jobs leave their logs, in the current folder.
FOLDER = "teach_jobs"


@dataclass(frozen=True, kw_only=True)
class Request(jobs.Request):
    """What is asked of the scheduler for all parts."""

    parts: int
    parallel: int


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
    executor = jobs.executor_for(
        "teach", f"{FOLDER}/%j", request, slurm, parallel=request.parallel, cluster=cluster
    )
    parts = [[*words, "--part", f"{part + 1}/{request.parts}"] for part in range(request.parts)]
    job = jobs.CommandJob(os.getcwd())
    with refusals_told(1, executor):
        if executor.is_local:
            say(f"no scheduler here: as processes, {request.parallel} at a time; logs in {FOLDER}")
            return _run_through(executor, job, parts, request.parallel, say)
        with executor.batch():
            submitted = [executor.submit(job, part) for part in parts]
    first, last = submitted[0].job_id, submitted[-1].job_id
    say(f"{request.parts} parts are the jobs {first} to {last}; logs in {FOLDER}")
    return []


def _run_through(
    executor: Executor,
    job: jobs.CommandJob,
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
                say(f"{jobs.why_it_failed(ended, 'a part failed')}; see {ended.paths.stderr}")
    return failed
