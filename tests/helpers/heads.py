"""A head such as a user may have of their own: one number for each atom."""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.models.base import HeadInterface
from torch import nn


class AtomHead(nn.Module, HeadInterface):
    """``charge`` ``(N,)`` out of the node embedding of a hydra's backbone."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(backbone.hidden_channels, 1)

    def forward(self, data: Any, emb: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"charge": self.linear(emb["node_embedding"]).squeeze(1)}
