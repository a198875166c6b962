"""What a training notes of its loss terms from step to step, for logs and records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


class Values:
    """Sums of named values over steps, on the device: reading them is what waits for it."""

    def __init__(self) -> None:
        # values that come together are added and read together: one small kernel, not dozens
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._steps = 0

    def note(self, names: Sequence[str], values: Tensor) -> None:
        """Add values of this step: ``(n,)``, one for each of the names."""
        names, values = tuple(names), values.detach()
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def note_now(self, name: str, value: Tensor) -> None:
        """Take a value ``()`` of this step alone, in place of an earlier one."""
        self._latest[name] = value.detach()

    def end_step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The mean of each over the steps since the last reading, or its one value."""
        means: dict[str, float] = {}
        for names, sums in self._sums.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                means[name] = means.get(name, 0.0) + value / self._steps
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
