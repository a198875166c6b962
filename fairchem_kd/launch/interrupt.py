"""Ctrl-C where several ranks are launched: they save and end by themselves, and are waited for.

torch's launcher ends its ranks at once, wherever they are. A terminal gives Ctrl-C to them as well,
and a training's ranks agree on a step to stop after; so the launching process lets the first one
pass, hands it on where there is no terminal to do so, and is as torch has it from the second on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from torch.distributed.elastic.multiprocessing import api

from fairchem_kd.training.interruption import AGAIN


@contextmanager
def ranks_stop_themselves() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is the ranks'; yields whether there was one."""
    original = api._terminate_process_handler
    first: list[float] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum != signal.SIGINT or (first and now - first[0] > AGAIN):
            original(signum, frame)
        if not first:
            first.append(now)
            if not os.isatty(0):
                for rank in multiprocessing.active_children():
                    with suppress(ProcessLookupError, TypeError):
                        os.kill(rank.pid, signal.SIGINT)  # type: ignore[arg-type]

    api._terminate_process_handler = handler
    try:
        yield lambda: bool(first)
    finally:
        api._terminate_process_handler = original
