"""Commands of ours as jobs of a scheduler, through submitit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submitit import Job
from submitit.helpers import Checkpointable, DelayedSubmission

from fairchem_kd.commands.main import main
from fairchem_kd.launch.submission import Executor
from fairchem_kd.sweep.scheduler import has_slurm

#: How often a job may run into its time limit and be queued again.
TIMEOUTS = 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks of the scheduler."""

    cpu: bool  #: no GPU for it
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    memory: int = 80  # GB
    hours: float = 72.0


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`Request` by the options of a command."""
    import torch

    return {
        "cpu": args.cpu or not (has_slurm() or torch.cuda.is_available()),
        "partition": args.slurm_partition,
        "account": args.slurm_account,
        "qos": args.slurm_qos,
        "memory": args.slurm_mem,
        "hours": args.slurm_timeout,
    }


class CommandJob(Checkpointable):
    """``fairchem-kd WORDS``, of commands that go on where they were: queued again, it does so.

    Args:
        directory: where it runs.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, words: Sequence[str]) -> None:
        """Run the command.

        Raises:
            RuntimeError: it failed; its own words are in the log.
        """
        os.chdir(self.directory)
        code = main(list(words))
        if code != 0:
            raise RuntimeError(f"fairchem-kd {' '.join(words)} ended with {code}")

    def checkpoint(self, words: Sequence[str]) -> DelayedSubmission:
        """Called by submitit before the job is queued again."""
        return DelayedSubmission(CommandJob(self.directory), words)


def executor_for(
    name: str,
    folder: str,
    request: Request,
    slurm: Mapping[str, Any] | None = None,
    *,
    parallel: int | None = None,
    cluster: str | None = None,
) -> Executor:
    """submitit's executor for jobs of one process each.

    Args:
        name: of the jobs.
        folder: of their logs, with ``%j`` for the job.
        request: what each asks for.
        slurm: the ``slurm`` block of a config.
        parallel: how many of an array may run at a time; None: there is no array.
        cluster: ``slurm`` or ``local`` in place of what is found.
    """
    executor = Executor(folder, cpu=request.cpu, cluster=cluster, slurm_max_num_timeout=TIMEOUTS)
    more = {} if parallel is None else {"slurm_array_parallelism": parallel}
    executor.update_parameters(
        name=name,
        mem_gb=request.memory,
        timeout_min=round(request.hours * 60),
        gpus_per_node=1,
        cpus_per_task=1,
        tasks_per_node=1,
        nodes=1,
        slurm_partition=request.partition,
        slurm_account=request.account,
        slurm_qos=request.qos,
        slurm_additional_parameters=dict(slurm or {}),
        **more,
    )
    return executor


def why_it_failed(job: Job[None], otherwise: str) -> str:
    """What the command of a job that failed said was wrong."""
    lines = [line for line in (job.stderr() or "").splitlines() if line.startswith("error: ")]
    return lines[-1].rstrip(".") if lines else otherwise
