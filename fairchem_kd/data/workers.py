"""Trajectories from several processes, in order, with a progress bar; no orphan outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TextIO

from tqdm import tqdm

from .frames import Trajectory

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
def worker_pool(processes: int, close: tuple[int, ...] = ()) -> Iterator[multiprocessing.pool.Pool]:
    """A pool of forked workers, ended on the way out whatever happens.

    Always processes of their own, even for one: what a label needs from OMP_NUM_THREADS is read
    when its library is loaded, and that happens only there.
    """
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with threads. The workers run numpy and ASE
        # only, and touch neither torch nor the parent's locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = context.Pool(processes, _start_worker, (os.getpid(), close))
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def trajectories(pool: multiprocessing.pool.Pool, make: Make) -> Iterator[Trajectory]:
    """``make(0)``, ``make(1)``, ... without end, computed ahead in bounded batches.

    The order, and so the data set, does not depend on the number of processes.
    """
    batch = 16
    indices = count()
    ahead = pool.map_async(make, [next(indices) for _ in range(batch)], chunksize=1)
    while True:
        done = ahead.get()
        ahead = pool.map_async(make, [next(indices) for _ in range(batch)], chunksize=1)
        yield from done


class Progress:
    """A bar on a terminal; elsewhere a plain line at most every ten seconds and at the end."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.title, self.total, self.done = title, total, 0
        self.bar = tqdm(total=total, desc=title, unit="frame", file=self.stream) \
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
            print(f"{self.title}: {self.done}/{self.total} frames, {took:.0f} s", file=self.stream)
            self.stream.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
