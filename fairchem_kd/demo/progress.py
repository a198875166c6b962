"""How far several trainings are: a line for each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

QUIET = 30.0  # seconds between two plain lines of a training


class Progress:
    """Shows steps on stderr while it is open."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: dict[str, tqdm[Any]] = {}
        self._totals: dict[str, int] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._terminal:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, name: str, steps: int) -> None:
        self._totals[name] = steps
        self._said[name] = time.monotonic()
        if self._terminal:
            taken = {abs(bar.pos) for bar in self._bars.values()}
            free = next(place for place in range(len(taken) + 1) if place not in taken)
            self._bars[name] = tqdm(
                total=steps, desc=name, unit="step", position=free, leave=False, file=sys.stderr
            )
        else:
            self.say(f"{name}: started, {steps} steps")

    def update(self, name: str, step: int, seconds: float) -> None:
        if self._terminal:
            bar = self._bars[name]
            bar.update(step - bar.n)
        elif time.monotonic() - self._said[name] >= QUIET:
            self._said[name] = time.monotonic()
            total = self._totals[name]
            left = f", about {seconds * (total - step) / step:.0f} s left" if step else ""
            self.say(f"{name}: step {step} of {total}, {seconds:.0f} s{left}")

    def end(self, name: str, seconds: float) -> None:
        if name in self._bars:
            self._bars.pop(name).close()
        self.say(f"{name}: done in {seconds:.0f} s")
