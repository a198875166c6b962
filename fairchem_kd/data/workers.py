"""Trajectories from several processes, in order, with progress; no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TextIO

from tqdm import tqdm

from fairchem_kd.data.frames import Trajectory

Make = Callable[[int], Trajectory]


def _start_worker(parent: int, close: tuple[int, ...]) -> None:
    """Give up the lock inherited from the parent, use one thread, and end when the parent does."""
    for descriptor in close:
        os.close(descriptor)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def worker_pool(processes: int, close: tuple[int, ...] = ()) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked workers, ended on the way out whatever happens.

    Always processes of their own, even for one: what a label needs from OMP_NUM_THREADS is read
    when its library is loaded, and that happens only there.

    Args:
        processes: how many workers.
        close: file descriptors that the workers must not inherit (a lock's).

    Raises:
        BrokenProcessPool: from the pool, when a worker was killed.
    """
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _start_worker, (os.getpid(), close)
    )
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork in a process with threads. The workers run numpy, ASE and
            # tblite only, and touch neither torch nor the parent's locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int).result()  # forks every worker now
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def trajectories(pool: ProcessPoolExecutor, make: Make, ahead: int) -> Iterator[Trajectory]:
    """``make(0)``, ``make(1)``, ... without end, in order, ``ahead`` of them in the making.

    The order, and so the data set, does not depend on the number of processes.
    """
    making = deque(pool.submit(make, index) for index in range(ahead))
    try:
        for index in count(ahead):
            yield making.popleft().result()
            making.append(pool.submit(make, index))
    finally:
        for future in making:
            future.cancel()


class Progress:
    """A bar on a terminal; elsewhere a plain line at most every ten seconds and at the end."""

    def __init__(
        self, title: str, total: int, stream: TextIO | None = None, unit: str = "frame"
    ) -> None:
        self.stream = stream or sys.stderr
        self.title, self.total, self.done, self.unit = title, total, 0, unit
        self.bar = tqdm(total=total, desc=title, unit=unit, file=self.stream) \
            if self.stream.isatty() else None  # fmt: skip
        self.start = self.last = time.monotonic()

    def advance(self, frames: int) -> None:
        frames = min(frames, self.total - self.done)
        self.done += frames
        if self.bar is not None:
            self.bar.update(frames)
            return
        now = time.monotonic()
        if now - self.last > 10 or (frames and self.done == self.total):
            self.last = now
            took = now - self.start
            left = took / self.done * (self.total - self.done) if self.done else 0.0
            more = f", about {left:.0f} s left" if left else ""
            print(
                f"{self.title}: {self.done}/{self.total} {self.unit}s, {took:.0f} s{more}",
                file=self.stream,
            )
            self.stream.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
