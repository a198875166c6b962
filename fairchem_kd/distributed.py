"""Reductions over ranks that wait for no host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of ``values`` over all ranks, in place; without other ranks the values themselves."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over ranks in one all-reduce, as DDP does for the student's own.

    A parameter without a gradient on some rank counts as zero there.
    """
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    all_sum(flat).div_(world_size())
    start = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()
