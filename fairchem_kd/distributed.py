"""Reductions over ranks that wait for no host, and what all ranks have to agree on."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from fairchem_kd.errors import UserError


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


def check_same_on_ranks(seen: Mapping[str, Any]) -> None:
    """Make sure that all ranks see the same; a collective.

    Args:
        seen: what this rank sees, in short values that can be pickled, by what a user calls it.

    Raises:
        UserError: on every rank, if one of them sees something else than the first.
    """
    if world_size() == 1:
        return
    everywhere: list[Any] = [None] * world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), dict(seen)))
    host, first = everywhere[0]
    for rank, (other_host, other) in enumerate(everywhere):
        for name, value in first.items():
            if other.get(name) != value:
                raise UserError(
                    f"{name} is not the same on every rank: {value} on rank 0 ({host}), "
                    f"{other.get(name)} on rank {rank} ({other_host}); give all of them the same "
                    "files, best on a file system that they share."
                )


def seen_by_rank(config: Mapping[str, Any], datasets: Sequence[Dataset | None]) -> dict[str, str]:
    """What this rank trains on, in short, for :func:`check_same_on_ranks`.

    Args:
        config: the trainer's.
        datasets: those for training, validation and test.
    """
    keys = ("task", "model", "outputs", "optim", "loss_functions")
    seen = {"the config": _digest(json.dumps([config[key] for key in keys], default=str).encode())}
    for name, dataset in zip(("train", "val", "test"), datasets, strict=True):
        if dataset is not None:
            seen[f"dataset.{name}"] = f"{len(dataset)} samples"  # type: ignore[arg-type]
            if dataset.metadata_hasattr("natoms"):  # type: ignore[attr-defined]
                sizes = dataset._metadata["natoms"]  # type: ignore[attr-defined]
                seen[f"dataset.{name}"] += f" (digest {_digest(np.asarray(sizes).tobytes())})"
    return seen


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:8]
