"""What the scheduler knows about a sweep's jobs."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

#: Jobs of submitit's local executor are named after a process, those of SLURM are not.
LOCAL = "local-"


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def living_jobs(jobs: Iterable[str]) -> dict[str, str] | None:
    """The jobs that run or wait, with the scheduler's word for it; None where it does not answer.

    ``squeue`` rather than ``sacct``, which needs an accounting database.
    """
    jobs = list(jobs)
    living = {job: "running" for job in jobs if job.startswith(LOCAL) and _process_lives(job)}
    if all(job.startswith(LOCAL) for job in jobs):
        return living
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    for line in done.stdout.splitlines():
        job, _, word = line.strip().partition(" ")
        if word not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"):
            living[job] = word.lower()
    return living


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
