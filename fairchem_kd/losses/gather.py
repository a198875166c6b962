"""The rows of all ranks in one tensor, for losses that compare atoms with each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks below each other, in their order and with their gradient.

    ``(N, ...)``, with an N of each rank's own, to ``(sum of N, ...)``, the same on every rank. The
    gradient of a row is the sum over what all ranks make of it. Both ways are collectives: every
    rank calls this as often and in the same order, one without rows too, and every rank runs the
    backward. It waits for the numbers of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    gathered: Tensor = _GatherRows.apply(tensor)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, own)
        lengths = torch.cat(counts).tolist()
        ctx.start, ctx.length = sum(lengths[: dist.get_rank()]), len(rows)
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole[ctx.start : ctx.start + ctx.length]
