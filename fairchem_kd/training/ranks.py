"""Reductions over ranks that wait for no host, and what all ranks have to agree on."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from torch.utils.data import Dataset, Subset

from fairchem_kd.digest import sha256_of
from fairchem_kd.errors import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def told_by_first(text: str, device: torch.device) -> str:
    """The first rank's ``text``, on every rank; a collective."""
    told = [text]
    distutils.broadcast_object_list(told, src=0, device=device)
    return told[0]


def same_on_ranks(value: Any) -> Any:
    """The first rank's ``value``, on every rank; a collective."""
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


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


@contextmanager
def refused_by_all() -> Iterator[None]:
    """Within the block ranks work apart; an error of one of them is one of all at its end.

    A rank that ends alone leaves the others waiting for it, for as long as the backend has
    patience. A collective.

    Raises:
        UserError: on the ranks that had no error of their own.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if world_size() > 1:
        said = "" if error is None else str(error) or type(error).__name__
        everywhere: list[Any] = [None] * world_size()
        dist.all_gather_object(everywhere, (socket.gethostname(), said))
        for rank, (host, theirs) in enumerate(everywhere):
            if theirs and error is None:
                error = UserError(f"{theirs} (On rank {rank}, {host}, but not on all.)")
    if error is not None:
        raise error


def seen_by_rank(
    config: Mapping[str, Any], datasets: Mapping[str, Dataset | None]
) -> dict[str, str]:
    """What this rank trains on, in short, for :func:`check_same_on_ranks`.

    Args:
        config: the trainer's.
        datasets: by what a user calls them.
    """
    keys = ("task", "model", "outputs", "optim", "loss_functions")
    seen = {"the config": _digest(json.dumps([config[key] for key in keys], default=str).encode())}
    for name, dataset in datasets.items():
        if dataset is not None:
            count = len(dataset)  # type: ignore[arg-type]
            places = {0, count // 2, count - 1} if count else set()
            contents = b"".join(_contents(dataset[i], config["outputs"]) for i in places)
            whole = dataset.dataset if isinstance(dataset, Subset) else dataset
            if whole.metadata_hasattr("natoms"):  # type: ignore[attr-defined]
                contents += np.asarray(whole._metadata["natoms"]).tobytes()  # type: ignore[attr-defined]
            seen[name] = f"{count} samples (digest {_digest(contents)})"
    return seen


def file_seen(path: str | Path) -> str:
    """A file in short, for :func:`check_same_on_ranks`."""
    try:
        size, digest = Path(path).stat().st_size, sha256_of(path)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{size} bytes (digest {digest[:8]})"


def _contents(sample: Any, targets: Iterable[str]) -> bytes:
    """A structure and its labels, as far as it has them."""
    names = dict.fromkeys(("atomic_numbers", "pos", "energy", "forces", *targets))
    values = [getattr(sample, name, None) for name in names]
    return b"".join(np.asarray(value).tobytes() for value in values if value is not None)


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:8]
