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
        self._times: dict[tuple[str, ...], int] = {}  # that each was noted
        self._rare: set[tuple[str, ...]] = set()
        self._latest: dict[str, Tensor] = {}
        self._steps = 0

    def note(self, names: Sequence[str], values: Tensor, *, rare: bool = False) -> None:
        """Add values of this step: ``(n,)``, one for each of the names.

        Args:
            rare: a step that does not note them has 0; of others it has none, as of a term that has
                not begun.
        """
        names, values = tuple(names), values.detach()
        self._times[names] = self._times.get(names, 0) + 1
        if rare:
            self._rare.add(names)
        self._sums[names] = self._sums[names] + values if names in self._sums else values

    def note_now(self, name: str, value: Tensor) -> None:
        """Take a value ``()`` of this step alone, in place of an earlier one."""
        self._latest[name] = value.detach()

    def end_step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The mean of each over the steps with it since the last reading, or its one value."""
        totals: dict[str, float] = {}
        steps: dict[str, int] = {}
        for names, sums in self._sums.items():
            times = self._steps if names in self._rare else self._times[names]
            for name, value in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + value
                steps[name] = steps.get(name, 0) + times
        means = {name: total / steps[name] for name, total in totals.items()}
        means |= {name: float(value) for name, value in self._latest.items()}
        self._sums, self._times, self._latest, self._steps = {}, {}, {}, 0
        return means

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block, values are kept apart from those of the steps around it."""
        kept = self._sums, self._times, self._latest, self._steps
        self._sums, self._times, self._latest, self._steps = {}, {}, {}, 0
        try:
            yield
        finally:
            self._sums, self._times, self._latest, self._steps = kept
