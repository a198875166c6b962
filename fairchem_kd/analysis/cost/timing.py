"""Stopwatches: synchronised with the device, and repeated."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fairchem_kd.analysis.cost.throughput import _wait
from fairchem_kd.machine import denormals_are_flushed, device_name


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the measurements lies between these."""
        import numpy as np

        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "quartiles": self.quartiles, "seconds": self.seconds}


def ratio(measured: Timing, reference: Timing) -> Timing:
    """Turn by turn: what both met alike, such as a busy machine, cancels."""
    pairs = zip(measured.seconds, reference.seconds, strict=True)
    return Timing([one / other for one, other in pairs])


def take_turns(
    ways: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int, warm_up: int
) -> list[Timing]:
    """Time several ways of doing something, one turn of each after the other.

    Every turn begins with another of them, since each leaves the caches to the next.

    Args:
        ways: what to time.
        device: whose work is waited for, before and after.
        repeats: timed turns.
        warm_up: turns before them.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(warm_up + repeats):
        for place in range(len(ways)):
            number = (turn + place) % len(ways)
            taken = clock(ways[number], device)
            if turn >= warm_up:
                seconds[number].append(taken)
    return [Timing(one) for one in seconds]


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


class Stopwatch:
    """Seconds by label; time in an inner section does not count for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def section(self, label: str) -> Iterator[None]:
        """Everything in the block, less its inner sections, counts for ``label``."""
        self._turn()
        self._stack.append(label)
        self.seconds.setdefault(label, 0.0)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    @property
    def running(self) -> str:
        """The innermost section, or nothing."""
        return self._stack[-1] if self._stack else ""

    def timed(self, label: str | Callable[[], str], function: Callable[..., Any]) -> Any:
        """``function``, every call of which is a section of its own."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.section(label if isinstance(label, str) else label()):
                return function(*args, **kwargs)

        return wrapped

    def _turn(self) -> None:
        """Give what has passed to the section that is running."""
        _wait(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call has allocated at once, at most, beyond what was there before it.

    On a GPU by the allocator's own count; on a CPU by adding up what torch's profiler saw allocated
    and freed, so that only tensors count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without(_OF_THE_PROFILER),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        function()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


#: Lines that the profiler writes past Python, whatever its log level: that it starts and stops, and
#: that memory is freed which was there before it.
_OF_THE_PROFILER = re.compile(rb"ActivityProfiler|CPUAllocator\.cpp")


@contextmanager
def _without(lines: re.Pattern[bytes]) -> Iterator[None]:
    """Within the block, hold back what this process writes to its standard error.

    What does not match ``lines`` is handed on in the end.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                file.seek(0)
                for line in file:
                    if not lines.search(line):
                        os.write(2, line)
    finally:
        os.close(kept)


def circumstances(device: torch.device) -> dict[str, Any]:
    """What timings depend on besides the model."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "flush_denormal": denormals_are_flushed(),
        "torch": torch.__version__,
    }
