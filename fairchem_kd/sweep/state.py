"""How far a run of a sweep has come: one small file per run, written by whoever runs it.

Files say what happened; whether a run that says "running" still does is looked up: on its own host
by its process, elsewhere by the file's heartbeat, in a queue by asking the scheduler.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.files import write_text
from fairchem_kd.processes import process_start
from fairchem_kd.reading import read_json
from fairchem_kd.sweep.log import last_words
from fairchem_kd.sweep.manifest import Manifest, Run, check_config
from fairchem_kd.sweep.scheduler import LOCAL, Jobs, known_jobs
from fairchem_kd.training.records import RECORDS, read_records

DONE, RUNNING, FAILED, PENDING = STATES = ("done", "running", "failed", "pending")
#: Seconds between signs of life, and after how many without one a run counts as ended.
HEARTBEAT, SILENCE = 15.0, 180.0


@dataclass(frozen=True)
class Status:
    """One of `STATES`, and why."""

    state: str
    reason: str = ""
    job: str | None = None  # in the scheduler's hands


def state_path(manifest: Manifest, run: Run) -> Path:
    return manifest.folder / "status" / f"{run.name}.json"


def write_state(manifest: Manifest, run: Run, state: str, **more: Any) -> None:
    """Note what happens to a run; ``more`` explains it (``reason``, ``job``, ...)."""
    contents = {"state": state, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **more}
    text = json.dumps(contents) + "\n"
    write_text(state_path(manifest, run), text)


def read_state(manifest: Manifest, run: Run) -> dict[str, Any]:
    """What was noted last; empty where nothing was."""
    try:
        contents = read_json(state_path(manifest, run))
    except (FileNotFoundError, ValueError):
        return {}
    texts = (contents.get(key) for key in ("reason", "job", "host", "started"))
    pid = contents.get("pid", 1)
    whole = (
        contents.get("state") in STATES
        and all(one is None or isinstance(one, str) for one in texts)
        and type(pid) is int
        and 0 < pid < 1 << 31
    )
    return contents if whole else {}


def _is_here(state: Mapping[str, Any]) -> bool:
    return state.get("host") == socket.gethostname()


def _is_alive(state: Mapping[str, Any], path: Path) -> bool:
    """Whether the process that noted ``running`` still runs."""
    if _is_here(state):
        if Path("/proc/self/stat").exists():
            return state.get("started") == process_start(state["pid"]) is not None
        try:
            os.kill(state["pid"], 0)
        except OSError:
            return False
        return True
    try:
        return _clock(path.parent) - path.stat().st_mtime < SILENCE
    except FileNotFoundError:
        return False


def _clock(folder: Path) -> float:
    """The time by the clock that stamps files there, which on a network is not this host's."""
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.touch()
        stamped = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return stamped


@contextmanager
def heartbeat(manifest: Manifest, run: Run) -> Iterator[None]:
    """Within the block, touch the run's state file, for hosts that cannot see the process."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(state_path(manifest, run))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def status(manifest: Manifest, run: Run, jobs: Jobs | None = None) -> Status:
    """Where a run is now.

    Args:
        jobs: what the scheduler says of jobs; None where it was not asked, and jobs are taken to
            be as they were noted.
    """
    noted = read_state(manifest, run)
    state, job = noted.get("state"), noted.get("job")
    if state == DONE:
        return Status(DONE)
    if state == FAILED:
        return Status(FAILED, noted.get("reason", ""))
    if job is not None and jobs is not None and (job in jobs.living or state == PENDING):
        return _of_job(manifest, run, noted, jobs)
    # Of a job on another host the scheduler knows more than a file that is still fresh.
    heard = job is None or jobs is None or _is_here(noted)
    if state == RUNNING and heard and _is_alive(noted, state_path(manifest, run)):
        return Status(RUNNING, f"{progress(manifest, run)}, {_place(noted)}", job)
    if state == PENDING and job is not None:
        return Status(PENDING, f"job {job} was queued", job)
    if state == RUNNING:
        why = _why_ended(manifest, job, jobs) or f"killed ({_place(noted)})"
        return Status(FAILED, f"{why}; goes on from {_kept(manifest, run)}")
    if state == PENDING:
        return Status(PENDING, f"{noted['reason']}; goes on from {_kept(manifest, run)}")
    started = (manifest.run_folder(run) / "checkpoint.pt").exists()
    return Status(PENDING, f"goes on from {_kept(manifest, run)}" if started else "not started")


def _of_job(manifest: Manifest, run: Run, noted: Mapping[str, Any], jobs: Jobs) -> Status:
    """The status of a run whose job waits or runs, or has left the queue without having run."""
    job = noted["job"]
    word = jobs.living.get(job)
    if word is None:
        why = _why_ended(manifest, job, jobs) or f"job {job} is gone"
        return Status(FAILED, f"{why}; goes on from {_kept(manifest, run)}")
    if noted["state"] == RUNNING and word == "running":
        return Status(RUNNING, f"{progress(manifest, run)}, {_place(noted)}", job)
    return Status(RUNNING if word == "running" else PENDING, f"job {job} is {word}", job)


def _why_ended(manifest: Manifest, job: str | None, jobs: Jobs | None) -> str:
    """Why a job ended that could not note it: what the scheduler says, or what it wrote last."""
    if job is None:
        return ""
    name = job.removeprefix(LOCAL)
    words = last_words(manifest.folder / "jobs" / name / f"{name}_0_log.err", "")
    words = (jobs.ended.get(job) if jobs else "") or words
    return f"job {job}: {words}" if words else ""


def statuses(manifest: Manifest) -> dict[str, Status]:
    """The status of every run of the manifest, by name; the scheduler is asked once, if at all."""
    noted = [read_state(manifest, run) for run in manifest.runs]
    asked = [n["job"] for n in noted if n.get("job") and n.get("state") in (RUNNING, PENDING)]
    jobs = known_jobs(asked) if asked else Jobs({})
    return {run.name: status(manifest, run, jobs) for run in manifest.runs}


def _place(noted: Mapping[str, Any]) -> str:
    job = f"job {noted['job']}, " if noted.get("job") else ""
    return f"{job}process {noted.get('pid')} on {noted.get('host')}"


def progress(manifest: Manifest, run: Run) -> str:
    """``epoch 2.5 of 7``, from the run's records."""
    folder = manifest.run_folder(run)
    last = 0.0
    if (folder / RECORDS).exists():
        last = max((r["epoch"] for r in read_records(folder) if "epoch" in r), default=0.0)
    epochs = (check_config(manifest, run).get("optim") or {}).get("max_epochs", "?")
    return f"epoch {last:.3g} of {epochs}"


def _kept(manifest: Manifest, run: Run) -> str:
    if (manifest.run_folder(run) / "checkpoint.pt").exists():
        return f"its last checkpoint (it had come to {progress(manifest, run)})"
    return "the start"
