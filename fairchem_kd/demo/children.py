"""Trainings side by side, each in a process of its own with one thread, with progress.

What finished stays: a training whose folder has a ``done.json`` is not run again. One that was cut
off starts afresh, so that its seconds are those of one undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fairchem_kd.demo.plan import Training
from fairchem_kd.demo.progress import Progress
from fairchem_kd.errors import UserError
from fairchem_kd.files import write_text
from fairchem_kd.launch import claim
from fairchem_kd.reading import parse_json, read_json
from fairchem_kd.teachers.place import VARIABLE
from fairchem_kd.training.records import RECORDS, read_records

DONE, LOG, CONFIG = "done.json", "log.txt", "config.yml"
POLL = 0.5  # seconds
PATIENCE = 10.0  # seconds that a child has to end by itself
TAIL = 15  # lines of a failed child's log
#: What of a record counts as a training's seconds. On a CPU each has one thread, whose own time
#: does not grow with what else the machine does.
TIME = {"cpu": "cpu_seconds", "cuda": "seconds"}
STORE = "teacher_store"  # of what the teacher said, in the demo's folder, for all trainings
PRINT_EVERY = 10  # steps between two records, from which progress is read

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Finished:
    """A training that ended well."""

    training: Training
    seconds: float  #: of training, evaluations and the teacher's setting up included: see `TIME`
    checkpoint: Path


@dataclass
class _Child:
    training: Training
    folder: Path
    process: subprocess.Popen[bytes]


class Interrupted(Exception):
    """A signal asked the driver to end."""


def claimed(out: Path) -> AbstractContextManager[int]:
    """The lock by which this demo has ``out`` (:func:`fairchem_kd.launch.claim.claimed`)."""
    return claim.claimed(
        out,
        f"Another demo, or a training that one left behind, is at work in {out}: wait for "
        "it, or write somewhere else with --out.",
    )


class _Requests:
    """Requests to end, as exceptions."""

    def __init__(self) -> None:
        self._holding = False
        self._noted: int | None = None

    def take(self, number: int, frame: Any) -> None:
        """The handler of a signal."""
        if not self._holding:
            raise Interrupted(signal.Signals(number).name)
        self._noted = number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block none is raised: a child that has just begun would be nobody's."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._noted is not None:
            raise Interrupted(signal.Signals(self._noted).name)


@contextmanager
def signals_raised() -> Iterator[_Requests]:
    """Within the block, a request to end is an exception, so that children are stopped first."""
    requests = _Requests()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, requests.take) for number in signals}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_all(
    trainings: Sequence[Training],
    out: Path,
    *,
    jobs: int,
    lock: int,
    then: Callable[[Finished, list[Finished]], Sequence[Training]] = lambda one, so_far: (),
) -> list[Finished]:
    """Run the trainings, ``jobs`` at a time, in the order given.

    Args:
        trainings: what to run.
        out: each gets a folder of its own in here.
        jobs: how many run at the same time.
        lock: of :func:`claimed`.
        then: asked after each that ended, with all that have; gives more to run.

    Raises:
        UserError: a training failed; the others are stopped, and the last lines are told.
        Interrupted: by a signal; all are stopped.
    """
    waiting = list(trainings)
    running: list[_Child] = []
    finished: list[Finished] = []
    with signals_raised() as requests, Progress() as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    training = waiting.pop(0)
                    done = read_done(training, out)
                    if done is None:
                        with requests.held():
                            running.append(_start(training, out, lock))
                        progress.start(training.title, training.steps)
                    else:
                        progress.say(f"{training.title}: done before, {done.seconds:.0f} s")
                        finished.append(done)
                        waiting += then(done, finished)
                time.sleep(POLL if running else 0)
                for child in list(running):
                    progress.update(child.training.title, *_step(child.folder))
                    if child.process.poll() is None:
                        continue
                    running.remove(child)
                    done = _finish(child)
                    progress.end(child.training.title, done.seconds)
                    finished.append(done)
                    waiting += then(done, finished)
        finally:
            stop([child.process for child in running])
    return finished


def read_done(training: Training, out: Path) -> Finished | None:
    """The result of a training that ended well before; None where there is none."""
    folder = out / training.folder
    try:
        content = read_json(folder / DONE)
        checkpoint = folder / content["checkpoint"]
        seconds = float(content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Finished(training, seconds, checkpoint) if checkpoint.is_file() else None


def _start(training: Training, out: Path, lock: int) -> _Child:
    folder = out / training.folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    text = yaml.safe_dump(dict(training.config), sort_keys=False)
    write_text(folder / CONFIG, text)
    command = [sys.executable, "-m", "fairchem_kd", "main", "--mode", "train"]
    command += ["--config-yml", str(folder / CONFIG), "--run-dir", str(folder)]
    command += ["--identifier", f"{training.name}-s{training.seed}", "--seed", str(training.seed)]
    command += ["--print-every", str(PRINT_EVERY)]
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(out),
            start_new_session=True,  # Ctrl-C is for the driver, which then stops its children
            pass_fds=(lock,),
        )
    return _Child(training, folder, process)


def environment(out: Path) -> dict[str, str]:
    """Of the demo's processes: one thread each, and one store of what the teacher said."""
    threads = dict.fromkeys(_THREADS, "1")
    return {**os.environ, **threads, VARIABLE: str((out / STORE).absolute())}


def _step(folder: Path) -> tuple[int, float]:
    """The last step on record and the seconds that it took to get there."""
    for path in folder.glob(f"checkpoints/*/{RECORDS}"):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                record = parse_json(line.decode())
                return int(record["step"]), float(record["seconds"])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # cut off, at either end
    return 0, 0.0


def _finish(child: _Child) -> Finished:
    """Note that a child ended well, or raise."""
    best = sorted(child.folder.glob("checkpoints/*/best_checkpoint.pt"))
    ends = read_records(best[-1].parent, "end") if best else []
    if child.process.returncode != 0 or not ends:
        path = child.folder / LOG
        code = child.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == 0:
            how = "saved no best_checkpoint.pt (it was never evaluated)"
        raise UserError(
            f"The training {child.training.title} {how}; the others were stopped. Mend it and "
            f"start again: what finished is kept. The last lines of {path}:\n  {tail(path)}"
        )
    taken = float(ends[-1][TIME["cuda" if torch.cuda.is_available() else "cpu"]])
    content = {
        "seconds": taken,
        "steps": child.training.steps,
        "checkpoint": str(best[-1].relative_to(child.folder)),
    }
    write_text(child.folder / DONE, json.dumps(content) + "\n")
    return Finished(child.training, taken, best[-1])


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text("utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n  ".join(lines)


def stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs of sessions that were started here, politely first."""
    for child in children:
        _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if child.poll() is None:
        os.killpg(child.pid, number)  # a session's first process leads its group
