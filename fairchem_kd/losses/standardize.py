"""Standardisation of the teacher's features, so that coefficients have one scale for every pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

# A channel that hardly varies carries little, and dividing by its tiny spread would only amplify
# rounding noise: no channel's scale is below this fraction of the typical one.
FLOOR = 0.01
# Below this fraction of the largest spread a channel counts as dead and says nothing about what is
# typical; rounding in fp32 alone gives a constant channel about 1e-7 of its value.
DEAD = 1e-5


class Standardizer(nn.Module):
    """Scalars minus mean over std per channel; vectors over one rms per channel, without a shift.

    std and rms are over atoms (and xyz: a scale per component would not be equivariant). The scale
    of a channel is at least :data:`FLOOR` times the median over the live channels; where all are
    dead, 1. Statistics come in a stream of batches, are merged in float64 by Chan's pairwise
    update (which does not cancel, however large the mean), and are part of the state_dict. Before
    :meth:`finalize` the scale is NaN, so that an unfitted standardizer cannot pass unseen.

    Args:
        kind: ``vector`` for values ``(N, 3, C)``, else ``(N, C)``.
        channels: C.
        name: of the feature, for messages.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self, kind: Literal["node", "vector", "edge"], channels: int, name: str = "feature"
    ) -> None:
        super().__init__()
        self.vector = kind == "vector"
        self.channels = channels
        self.name = name
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))
        # sum of squared deviations from the mean (from 0 for vectors)
        self.register_buffer("squares", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.full((channels,), float("nan")))

    @property
    def fitted(self) -> bool:
        """Whether the statistics are final (waits for the device)."""
        return bool(self.scale.isfinite().all())

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in one batch of the teacher's features, ``(N, C)`` or ``(N, 3, C)``.

        Raises:
            ValueError: another shape than promised.
        """
        dims = 3 if self.vector else 2
        if values.dim() != dims or values.shape[-1] != self.channels:
            shape = f"(N, 3, {self.channels})" if self.vector else f"(N, {self.channels})"
            raise ValueError(f"{self.name} must be {shape}, not {tuple(values.shape)}")
        rows = values.detach().reshape(-1, self.channels).double()
        if len(rows) == 0:
            return
        mean = torch.zeros_like(self.mean) if self.vector else rows.mean(0)
        squares = (rows - mean).square().sum(0)
        total = self.count + len(rows)
        delta = mean - self.mean
        self.squares += squares + delta.square() * (self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count.copy_(total)

    @torch.no_grad()
    def finalize(self) -> None:
        """Fix shift and scale from what :meth:`update` has seen.

        Raises:
            ValueError: no values were seen, or they were not finite.
        """
        if self.count == 0:
            raise ValueError(f"{self.name}: no values to take statistics from")
        spread = (self.squares / self.count).sqrt()
        if not bool((spread.isfinite() & self.mean.isfinite()).all()):
            raise ValueError(f"{self.name} is not finite (NaN or infinity)")
        live = spread[spread > DEAD * spread.max()]
        floor = FLOOR * live.median() if len(live) else spread.new_ones(())
        self.shift.copy_(self.mean)
        self.scale.copy_(spread.clamp(min=floor))

    def forward(self, values: Tensor) -> Tensor:
        """Standardised values, ``(N, C)`` or ``(N, 3, C)``."""
        return values / self.scale if self.vector else (values - self.shift) / self.scale
