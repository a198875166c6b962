"""How a loss coefficient changes over a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairchem_kd.errors import UserError
from fairchem_kd.schema import option


@dataclass
class Schedule:
    """From ``start`` to ``stop``: linear warm-up from 0, then a decay to ``final``. Else 0.

    ``start`` and ``stop`` are shares of the training up to 1, and numbers of steps above. A pure
    function of the step, so a resumed run needs no state of it.
    """

    start: float = option(0.0, ge=0, help="where it begins: a share of the training, or a step")
    stop: float | None = option(
        None, gt=0, help="where it ends: a share of the training, or the last step; default: never"
    )
    warmup_steps: int = option(0, ge=0, help="steps of a linear rise from 0, from `start` on")
    decay: str = option("none", choices=("none", "linear", "cosine"), help="shape of the decay")
    final: float = option(0.0, ge=0.0, help="fraction of the coefficient left at the end")

    def check(self, where: str) -> None:
        """Refuse one that ends before it begins, as far as that shows without a training."""
        alike = self.stop is not None and (self.start > 1) == (self.stop > 1)
        if alike and self.stop is not None and self.start >= self.stop:
            raise UserError(
                f"{where}.stop ({self.stop:g}) must come after {where}.start ({self.start:g})."
            )

    def span(self, last_step: int) -> tuple[int, int]:
        """The last step before it begins, and the last one of it."""
        before = _steps(self.start, last_step)
        end = last_step if self.stop is None else min(_steps(self.stop, last_step), last_step)
        return before, end

    def runs(self, step: int, last_step: int) -> bool:
        """Whether the term counts at all at this step, counted from 1."""
        before, end = self.span(last_step)
        return (before < step or before == 0) and (self.stop is None or step <= end)

    def factor(self, step: int, last_step: int) -> float:
        """The factor on the coefficient at optimiser step ``step``, counted from 1."""
        if not self.runs(step, last_step):
            return 0.0
        before, end = self.span(last_step)
        step, end = step - before, end - before
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.decay == "none":
            return 1.0
        length = max(end - self.warmup_steps, 1)
        done = min(max((step - self.warmup_steps) / length, 0.0), 1.0)
        left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final + (1.0 - self.final) * left


def _steps(place: float, last_step: int) -> int:
    return round(place * last_step) if place <= 1 else round(place)
