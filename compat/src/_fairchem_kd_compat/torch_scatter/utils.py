"""Index broadcasting."""

from __future__ import annotations

from torch import Tensor


def broadcast(src: Tensor, other: Tensor, dim: int) -> Tensor:
    """Expand an index ``src`` to the shape of ``other``, a 1-d index lying along ``dim``."""
    if dim < 0:
        dim += other.dim()
    if src.dim() == 1:
        src = src.view((1,) * dim + (-1,))
    src = src.view(src.shape + (1,) * (other.dim() - src.dim()))
    return src.expand_as(other)
