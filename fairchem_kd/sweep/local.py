"""A sweep on this machine: several runs at a time, each a process with its own threads and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from fairchem_kd.errors import UserError
from fairchem_kd.machine import available_cores
from fairchem_kd.sweep.columns import titles
from fairchem_kd.sweep.job import TAKEN
from fairchem_kd.sweep.log import last_words
from fairchem_kd.sweep.manifest import Manifest, Run
from fairchem_kd.sweep.state import DONE, FAILED, PENDING, RUNNING, read_state, write_state

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass
class Machine:
    """What the runs share: so many at a time, each with its threads and GPUs.

    Args:
        workers: how many runs at a time; None: as many as there are GPUs for, one without GPUs.
        threads: of each run; None: the cores, shared out.
        gpus: how many each run takes, or ranks without GPUs.
        cpu: leave GPUs alone.
    """

    workers: int | None = None
    threads: int | None = None
    gpus: int = 1
    cpu: bool = False

    def __post_init__(self) -> None:
        import torch

        devices = 0 if self.cpu else torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",") if visible and devices else list(map(str, range(devices)))
        if self.devices and len(self.devices) < self.gpus:
            raise UserError(
                f"--num-gpus is {self.gpus}, but this machine has {len(self.devices)} GPUs."
            )
        slots = len(self.devices) // self.gpus
        self.workers = self.workers or slots or 1
        if slots and self.workers > slots:
            raise UserError(
                f"--workers {self.workers} with {self.gpus} GPUs each need more than the "
                f"{len(self.devices)} GPUs here; give at most {slots} (or --cpu)."
            )
        ranks = self.workers * self.gpus
        self.threads = self.threads or max(1, available_cores() // ranks)

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of the run in a slot: its threads, and its GPUs alone."""
        changes = dict.fromkeys(_THREADS, str(self.threads))
        if self.devices:
            mine = self.devices[slot * self.gpus : (slot + 1) * self.gpus]
            changes["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return {**os.environ, **changes}

    @property
    def arguments(self) -> list[str]:
        """Of the fairchem command."""
        return ["--num-gpus", str(self.gpus), *(["--cpu"] if self.cpu else [])]


def run_locally(
    manifest: Manifest,
    runs: Sequence[Run],
    machine: Machine,
    say: Callable[[str], None] = print,
    more: Sequence[str] = (),
) -> list[Run]:
    """Train ``runs``, those that were begun from where they are; returns those that failed.

    A run that fails does not stop the others. When this process ends, its runs end with it, and go
    on from their last checkpoints when the sweep is run again.

    Args:
        more: further arguments of the fairchem command, such as ``--print-every 50``.
    """
    told = titles(manifest.runs)
    waiting = list(reversed(runs))
    free = list(reversed(range(machine.workers or 1)))
    going: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    failed = []
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or going:
            while waiting and free:
                run, slot = waiting.pop(), free.pop()
                going[slot] = run, _start(manifest, run, machine, slot, more)
                number = len(runs) - len(waiting)
                what = f"{told[run.name]}, seed {run.seed}"
                say(f"{run.name} started ({number} of {len(runs)}): {what}")
            for slot, (run, process) in list(going.items()):
                if process.poll() is None:
                    continue
                del going[slot]
                free.append(slot)
                if not _note_end(manifest, run, process.returncode, say):
                    failed.append(run)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, handler)
        _stop([process for _, process in going.values()])
        for run, process in going.values():
            _note_stop(manifest, run, process.pid)
    return failed


def _start(
    manifest: Manifest, run: Run, machine: Machine, slot: int, more: Sequence[str]
) -> subprocess.Popen[bytes]:
    output = manifest.output_path(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fairchem_kd.sweep.job", str(manifest.folder), run.name]
    log: IO[bytes]
    with output.open("ab") as log:
        return subprocess.Popen(
            [*command, str(os.getpid()), *machine.arguments, *more],
            cwd=manifest.directory,
            env=machine.environment(slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends its runs
        )


def _note_end(manifest: Manifest, run: Run, code: int, say: Callable[[str], None]) -> bool:
    """Say how a run ended, and note it where the run could not; whether it is done."""
    noted = read_state(manifest, run)
    if code == 0 and noted.get("state") == DONE:
        say(f"{run.name} done")
        return True
    if code == TAKEN:
        say(f"{run.name} is run by another process")
        return True
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        reason += " (out of memory?)" if -code == signal.SIGKILL else ""
    else:
        reason = noted.get("reason") or last_words(manifest.output_path(run), f"exit code {code}")
    write_state(manifest, run, FAILED, reason=reason)
    say(f"{run.name} FAILED: {reason} (output in {manifest.output_path(run)})")
    return False


def _note_stop(manifest: Manifest, run: Run, pid: int) -> None:
    """Note that a run's process was stopped, unless the run has ended, or is another's."""
    noted = read_state(manifest, run)
    if (noted.get("state"), noted.get("pid")) == (RUNNING, pid):
        write_state(manifest, run, PENDING, reason="stopped")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
