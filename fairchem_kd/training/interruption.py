"""What a scheduler's signals ask of a training, answered between two of its steps.

submitit's handler saves and requeues wherever the program happens to be: the step may be that of
one update and the weights those of the one before, and only the first rank is asked. While a
training runs, its signals are noted instead. The training asks for them where its state is whole,
all ranks together, saves, and then lets submitit's own handler go on.
"""

from __future__ import annotations

import enum
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from submitit.core.job_environment import JobEnvironment, SignalHandler

from fairchem_kd.training.ranks import rank, world_size


class Ask(enum.IntEnum):
    """What is asked of a training, the more urgent the greater."""

    NOTHING = 0
    SAVE = 1  # a kill may follow
    STOP = 2  # save, say how to go on, and end: Ctrl-C
    LEAVE = 3  # save, be requeued, and exit


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint was saved; says how to go on."""


_INTERRUPT = signal.default_int_handler
AGAIN = 0.5  # seconds after which a second Ctrl-C is one: launchers send the first one twice


_SAID = "\nstopping at the end of this step, with a checkpoint; Ctrl-C again: at once\n"


def how_to_go_on(run: str) -> str:
    """The command with which this process was started, for going on with a run."""
    program, *words = sys.argv
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--timestamp-id":
            kept.pop()
        elif not word.startswith("--timestamp-id="):
            kept.append(word)
    name = Path(program).name
    start = ["python", "-m", "fairchem_kd"] if name in ("__main__.py", "-m") else [name]
    return shlex.join([*start, *kept, "--timestamp-id", run])


def signals_of_job() -> list[int]:
    """The signals that submitit answers in this process; none where it is no job of submitit's."""
    number = JobEnvironment._usr_sig()
    handler = signal.getsignal(number)
    if not isinstance(getattr(handler, "__self__", None), SignalHandler):
        return []
    return [int(number), int(signal.SIGTERM)]


class Interruption:
    """Holds back submitit's signals within a ``with`` block; without submitit it does nothing.

    SIGTERM, after which a scheduler kills, asks for a save; submitit's own signal (SIGUSR2, or what
    ``SUBMITIT_PREEMPT_SIGNAL`` says; sent ahead of a time-out, and of a pre-emption where the
    cluster is set up so) asks for a save and for leaving.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        #: Whether submitit's handler is at work, to which there is nothing left to be saved.
        self.answering = False
        self._process = os.getpid()
        self._signal = JobEnvironment._usr_sig()
        self._handlers: dict[int, Any] = {}
        self._noted: list[Ask] = []
        #: Whether the training looks for `stopped` between its steps, so that Ctrl-C can wait.
        self.polled = False
        self._stopped_at: float | None = None
        self._own_interrupt: Any = None
        self._interrupts = False  # whether every rank holds Ctrl-C back
        #: Whether Ctrl-C has asked to save and to stop; said by `asked`, to all ranks alike.
        self.stopped = False

    @property
    def held(self) -> bool:
        return bool(self._handlers)

    def __enter__(self) -> Interruption:
        for number in signals_of_job():
            self._handlers[number] = signal.signal(number, self._note)
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is _INTERRUPT:
            self._own_interrupt = signal.signal(signal.SIGINT, self._interrupted)
        self._interrupts = self._own_interrupt is not None
        if world_size() > 1:
            held = torch.tensor(int(self._interrupts), device=self.device)
            dist.all_reduce(held, op=dist.ReduceOp.MIN)
            self._interrupts = bool(held)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._own_interrupt is not None:
            signal.signal(signal.SIGINT, self._own_interrupt)
            self._own_interrupt = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if kind is None and Ask.LEAVE in self._noted:
            logging.info("The training was over when it was asked to stop")

    def _interrupted(self, number: int, frame: Any) -> None:
        """Ctrl-C: the first one waits for the end of the step, a second one does not."""
        if os.getpid() != self._process:
            return  # a loader's worker, which the training will end
        now = time.monotonic()
        waits = self.polled and self._interrupts
        if not waits or (self._stopped_at is not None and now - self._stopped_at > AGAIN):
            raise KeyboardInterrupt
        if self._stopped_at is None:
            self._stopped_at = now
            self._noted.append(Ask.STOP)
            if rank() == 0:
                os.write(2, _SAID.encode())

    def _note(self, number: int, frame: Any) -> None:
        # Data-loader workers are forked with this handler, and some schedulers signal them as well.
        if os.getpid() == self._process:
            self._noted.append(Ask.LEAVE if number == self._signal else Ask.SAVE)

    @property
    def noted(self) -> bool:
        """Whether this process has been asked to leave, which `asked` will say to all ranks."""
        return Ask.LEAVE in self._noted

    def asked(self) -> Ask:
        """The most urgent thing that any rank was asked since the last time, on every rank.

        A collective where signals are held and there are several ranks: a rank may have had its
        signal one step before another.
        """
        if not self.held and not self._interrupts:
            return Ask.NOTHING
        asked = Ask.NOTHING
        while self._noted:  # popped one by one: a signal may come at any moment
            asked = max(asked, self._noted.pop())
        if world_size() > 1:
            urgency = torch.tensor(int(asked), device=self.device)
            dist.all_reduce(urgency, op=dist.ReduceOp.MAX)
            asked = Ask(int(urgency))
        self.stopped = self.stopped or asked is Ask.STOP
        return asked

    def leave(self) -> NoReturn:
        """Let submitit requeue the job, and exit; to be called on every rank."""
        self.answering = True
        requeue: Callable[[int, Any], Any] = self._handlers[self._signal]
        try:
            requeue(self._signal, None)  # which exits on the first rank and returns on the others
        finally:
            distutils.synchronize()  # a rank that ends early could take the first one with it
            distutils.cleanup()
        raise SystemExit(0)
