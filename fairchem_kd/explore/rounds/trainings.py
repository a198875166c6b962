"""The trainings of rounds: each in a process of its own, and gone on with where it was cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from fairchem_kd.errors import UserError
from fairchem_kd.files import write_text
from fairchem_kd.launch import claim
from fairchem_kd.teachers.place import VARIABLE
from fairchem_kd.training.interruption import signals_of_job
from fairchem_kd.training.records import read_records

CONFIG, LOG = "config.yml", "log.txt"
BEST = "best_checkpoint.pt"
RUN = "student"  # the name of a training's run, in a folder of its own
STORE = "teacher_stores"  # of what the teacher said, in the folder of all rounds
_PATIENCE = 25.0  # seconds for the end of a step: schedulers kill 30 s after they have asked
_SAVING = 120.0  # seconds for which a requeued job waits for what it was before
_TAIL = 12  # lines of a failed training's log


def claimed(out: Path) -> AbstractContextManager[int]:
    """The lock by which these rounds have ``out`` (:func:`fairchem_kd.launch.claim.claimed`).

    A job that was queued again waits for the training that it has interrupted, which may still be
    saving.
    """
    return claim.claimed(
        out,
        f"Other rounds, or a training that some left behind, are at work in {out}: wait "
        "for them, or name another folder with --out.",
        patience=_SAVING if signals_of_job() else 0.0,
    )


def student_of(folder: Path) -> Path | None:
    """The best checkpoint of a training that has ended; None before that."""
    run = folder / "checkpoints" / RUN
    best = run / BEST
    return best if best.is_file() and read_records(run, "end") else None


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """The config of a training, without includes, in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))


def train(
    folder: Path,
    config: Path,
    *,
    start: Path | None,
    seed: int,
    more: Sequence[str],
    lock: int,
    stores: Path,
) -> Path:
    """Train, or go on with the training in ``folder``; the student's checkpoint.

    Args:
        folder: of this training alone.
        config: of :func:`write_config`.
        start: the student to begin with.
        seed: of the training.
        more: words of the command, ``--cpu`` for example.
        lock: of :func:`claimed`, which the training holds too.
        stores: where the stores of teachers are, for all rounds.

    Raises:
        UserError: it failed; the last lines of its log are told.
    """
    command = [sys.executable, "-m", "fairchem_kd", "main", "--mode", "train"]
    command += ["--config-yml", str(config), "--run-dir", str(folder)]
    command += ["--timestamp-id", RUN, "--seed", str(seed), *more]
    if start is not None:
        command += ["--checkpoint", str(start)]
    code = run_command(
        command, folder / LOG, {VARIABLE: str(stores.absolute()), **os.environ}, lock
    )
    best = student_of(folder)
    if code != 0 or best is None:
        how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        if code == 0:
            how = f"saved no {BEST} (it was never evaluated)"
        lines = (folder / LOG).read_text("utf-8", errors="replace").splitlines()[-_TAIL:]
        told = "\n  ".join(lines)
        raise UserError(
            f"The training in {folder} {how}; mend it and start the same command again, what has "
            f"ended is kept. The last lines of {folder / LOG}:\n  {told}"
        )
    return best


def run_command(
    command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int
) -> int:
    """Run a command to its end; its exit code.

    Where this process is to end before, the command is interrupted as by Ctrl-C, at which a
    training saves at the end of its step.

    Args:
        command: its words.
        log: gets what it prints, behind what is there.
        environment: of the process.
        lock: a descriptor that it keeps open.
    """
    with open(log, "ab") as file:
        process = subprocess.Popen(
            _shielded(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(lock,),
        )
    try:
        return process.wait()
    except BaseException:
        _interrupt(process)
        raise


def _shielded(command: Sequence[str]) -> list[str]:
    """The command, without a scheduler's signals in a job.

    They go to all processes of the job and would end the training at once; the process that waits
    for it answers them.
    """
    signals = signals_of_job()
    if not signals:
        return list(command)
    ignored = " ".join(map(str, signals))
    return ["sh", "-c", f'trap \'\' {ignored}; exec "$0" "$@"', *command]


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, and kill it where it does not end."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
