"""``fairchem-kd rounds --submit``: all rounds as one job, which goes on after each interruption."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairchem_kd.commands.jobs import CommandJob, Request, executor_for, why_it_failed
from fairchem_kd.launch.submission import refusals_told

#: Where the job leaves its logs, beside the folder of the rounds, which is theirs alone.
_SUFFIX = "_jobs"


def submit(
    words: Sequence[str],
    out: Path,
    request: Request,
    slurm: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] = print,
    cluster: str | None = None,
) -> bool:
    """Submit ``fairchem-kd WORDS``; whether it went well, as far as that is known.

    Without a scheduler it runs here, and this waits for it.

    Args:
        words: the command.
        out: the folder of the rounds.
        request: what the job asks for.
        slurm: the ``slurm`` block of the config.
        say: takes lines.
        cluster: ``slurm`` or ``local`` in place of what is found.

    Raises:
        UserError: the scheduler refuses the job.
    """
    folder = out.with_name(out.name + _SUFFIX)
    executor = executor_for("rounds", f"{folder}/%j", request, slurm, cluster=cluster)
    job = CommandJob(os.getcwd())
    with refusals_told(1, executor):
        submitted = executor.submit(job, list(words))
    if not executor.is_local:
        say(f"the rounds are job {submitted.job_id}; logs in {folder}, the table in {out}")
        return True
    say(f"no scheduler here: as process {submitted.job_id}; logs in {folder}")
    while not submitted.done():
        time.sleep(0.2)
    if submitted.exception() is None:
        say(f"the rounds are done; their table is in {out}")
        return True
    say(f"{why_it_failed(submitted, 'the rounds failed')}; see {submitted.paths.stderr}")
    return False
