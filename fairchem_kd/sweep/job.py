"""One run of a sweep, in a process of its own: the `fairchem` command, and notes on how it went.

``python -m fairchem_kd.sweep.job FOLDER NAME PARENT [ARGUMENT ...]`` is what the workers start;
PARENT is the process id without which the run stops too.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fairchem_kd.errors import UserError
from fairchem_kd.processes import this_process
from fairchem_kd.sweep.log import ATTEMPT, last_words
from fairchem_kd.sweep.manifest import Manifest, Run, check_config, read_manifest
from fairchem_kd.sweep.state import (
    DONE,
    FAILED,
    PENDING,
    RUNNING,
    heartbeat,
    read_state,
    status,
    write_state,
)

#: The exit code of a job whose run another process has taken.
TAKEN = 75


@contextmanager
def _locked(manifest: Manifest) -> Iterator[None]:
    """Within the block, no other process notes what is to become of a run."""
    lock = manifest.folder / "status" / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(manifest: Manifest, run: Run, job: str | None = None) -> bool:
    """Note that this process runs it; False where another one does already, or has done it.

    Args:
        job: the scheduler's id of this job; requeued, it takes over from itself.
    """
    with _locked(manifest):
        requeued = job is not None and read_state(manifest, run).get("job") == job
        if not requeued and status(manifest, run).state in (DONE, RUNNING):
            return False
        write_state(manifest, run, RUNNING, **this_process(), job=job)
    return True


def note_submitted(manifest: Manifest, run: Run, job: str) -> None:
    """Note a run's job, unless that has started, and noted itself, before."""
    with _locked(manifest):
        if read_state(manifest, run).get("job") != job:
            write_state(manifest, run, PENDING, job=job)


def run_here(manifest: Manifest, run: Run, arguments: Sequence[str]) -> int:
    """Train a run in this process, and note how it went; returns the exit code."""
    from fairchem_kd.launch.run import main as fairchem
    from fairchem_kd.stock.noise import drop_noise

    drop_noise()

    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{ATTEMPT} {now}, {run.point}, seed {run.seed}", flush=True)
    check_config(manifest, run)
    if not claim(manifest, run):
        return TAKEN
    with heartbeat(manifest, run):
        try:
            code = fairchem([*manifest.command(run), *arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        write_state(manifest, run, DONE)
    else:
        reason = last_words(manifest.output_path(run), f"exit code {code}")
        write_state(manifest, run, FAILED, reason=reason)
    return code


def _stop_with(parent: int) -> None:
    """End this process when its parent has ended, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str]) -> int:
    folder, name, parent, *arguments = argv
    _stop_with(int(parent))
    try:
        manifest = read_manifest(Path(folder))
        [run] = [run for run in manifest.runs if run.name == name]
        return run_here(manifest, run, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
