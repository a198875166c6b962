"""What a back end of the edge-to-node operators has."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fairchem_kd.ops.order import EdgeOrder


class Backend(Protocol):
    """One way to compute the three sums; none of them sees an empty tensor."""

    def nodes(
        self, features: Tensor, vectors: Tensor | None, order: EdgeOrder,
        scalar: bool, mean: bool, dtype: torch.dtype,
    ) -> Tensor: ...  # fmt: skip

    def edges(
        self, nodes: Tensor, vectors: Tensor | None, order: EdgeOrder,
        scalar: bool, mean: bool, dtype: torch.dtype,
    ) -> Tensor: ...  # fmt: skip

    def dots(
        self, features: Tensor, nodes: Tensor, order: EdgeOrder, mean: bool, dtype: torch.dtype
    ) -> Tensor: ...
