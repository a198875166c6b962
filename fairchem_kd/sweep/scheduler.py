"""What the scheduler knows about a sweep's jobs."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Jobs of submitit's local executor are named after a process, those of SLURM are not.
LOCAL = "local-"


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


#: SLURM's words for jobs that are over, and what they say of a run that did not end by itself.
_ENDED = {
    "completed": "",
    "failed": "",
    "revoked": "",
    "boot_fail": "its node did not start",
    "cancelled": "it was cancelled",
    "deadline": "it could not end before its deadline",
    "node_fail": "its node failed",
    "out_of_memory": "it was out of memory (--slurm-mem)",
    "preempted": "it was pre-empted, and not queued again",
    "timeout": "it ran out of time (--slurm-timeout)",
}


@dataclass(frozen=True)
class Jobs:
    """What the scheduler says of jobs, by id."""

    living: dict[str, str]  # its word for those that run or wait
    ended: dict[str, str] = field(default_factory=dict)  # why those ended that did not on their own


def known_jobs(jobs: Iterable[str]) -> Jobs | None:
    """What the scheduler knows of ``jobs``; None where it does not answer.

    ``squeue`` first, since ``sacct`` needs an accounting database; that is asked for jobs that
    ended longer ago than the scheduler remembers (minutes).
    """
    jobs = list(jobs)
    living = {job: "running" for job in jobs if job.startswith(LOCAL) and _process_lives(job)}
    others = [job for job in jobs if not job.startswith(LOCAL)]
    if not others:
        return Jobs(living)
    user = f"--user={getpass.getuser()}"
    said = _said("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", user)
    if said is None:
        return None
    known = {job: rest for job, rest in _rows(said) if job in others}
    gone = [job for job in others if job not in known]
    if gone and shutil.which("sacct"):
        fields = ["--noheader", "--allocations", "--parsable2", "--format=JobID,State"]
        said = _said("sacct", *fields, f"--jobs={','.join(gone)}") or ""
        known |= {job: rest for job, rest in _rows(said) if job in gone}
    ended = {}
    for job, (state, *why) in known.items():
        word = state.split()[0].lower()  # "CANCELLED by 1000"
        if word in _ENDED:
            ended[job] = _ENDED[word]
        else:
            waits = word == "pending" and why and why[0] not in ("None", "")
            living[job] = f"{word} ({why[0]})" if waits else word
    return Jobs(living, ended)


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _rows(said: str) -> Iterator[tuple[str, list[str]]]:
    for line in said.splitlines():
        job, *rest = line.strip().split("|")
        if rest and rest[0]:
            yield job, rest


def _process_lives(job: str) -> bool:
    pid = int(job.removeprefix(LOCAL))
    try:
        # A process id may be used again, but hardly by another of submitit's.
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc/self").exists()
