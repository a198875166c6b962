"""What a training notes of its loss terms from step to step, for logs and records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Values:
    """Sums of named values over steps, on the device: reading them is what waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._steps = 0

    def note(self, name: str, value: Tensor) -> None:
        """Add a value ``()`` of this step."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def note_now(self, name: str, value: Tensor) -> None:
        """Take a value ``()`` of this step alone, in place of an earlier one."""
        self._latest[name] = value.detach()

    def end_step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The mean of each over the steps since the last reading, or its one value."""
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        means |= {name: float(value) for name, value in self._latest.items()}
        self._sums, self._latest, self._steps = {}, {}, 0
        return means

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block, values are kept apart from those of the steps around it."""
        kept = self._sums, self._latest, self._steps
        self._sums, self._latest, self._steps = {}, {}, 0
        try:
            yield
        finally:
            self._sums, self._latest, self._steps = kept
