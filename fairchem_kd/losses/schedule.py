"""How a loss coefficient changes over a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairchem_kd.schema import option


@dataclass
class Schedule:
    """Linear warm-up from 0, then a decay to ``final`` at the last step of ``max_epochs``.

    A pure function of the step, so a resumed run needs no state of it.
    """

    warmup_steps: int = option(0, ge=0, help="steps of a linear rise from 0")
    decay: str = option("none", choices=("none", "linear", "cosine"), help="shape of the decay")
    final: float = option(0.0, ge=0.0, help="fraction of the coefficient left at the last step")

    def factor(self, step: int, last_step: int) -> float:
        """The factor on the coefficient at optimiser step ``step``, counted from 1."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.decay == "none":
            return 1.0
        length = max(last_step - self.warmup_steps, 1)
        done = min(max((step - self.warmup_steps) / length, 0.0), 1.0)
        left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final + (1.0 - self.final) * left
