"""The statistics with which teachers' features are standardised, fixed before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fairchem_kd.errors import UserError
from fairchem_kd.stock.structures import pick
from fairchem_kd.training.checks import check_finite
from fairchem_kd.training.ranks import rank, told_by_first, world_size

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch

    from fairchem_kd.features import Request
    from fairchem_kd.losses import Loss
    from fairchem_kd.teachers import Teacher

Collate = Callable[[list[Any]], "Batch"]


@torch.no_grad()
def fit_statistics(
    terms: Sequence[Loss],
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Dataset,
    collate: Collate,
    *,
    samples: int,
    device: torch.device,
) -> None:
    """Fix the standardisation on evenly spread training samples, on the first rank for all.

    Args:
        terms: whose statistics are fitted; the others are left alone.
        teacher: whose features are standardised.
        requests: those of its features that the terms compare.
        dataset: from which samples are taken.
        collate: makes a batch of samples.
        samples: how many.

    Raises:
        UserError: on every rank: samples that the teacher cannot take, features that do not vary.
    """
    fitted = [term for term in terms if term.needs_statistics]
    if not fitted:
        return
    error = ""  # told to the other ranks, which would wait for the statistics
    if rank() == 0:
        try:
            _fit(fitted, teacher, requests, dataset, collate, samples, device)
        except UserError as refusal:
            error = str(refusal)
    error = told_by_first(error, device)
    if error:
        raise UserError(error)
    if world_size() > 1:
        for buffer in nn.ModuleList(terms).buffers():
            dist.broadcast(buffer, src=0)


def _fit(
    terms: list[Loss],
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Dataset,
    collate: Collate,
    samples: int,
    device: torch.device,
) -> None:
    count = len(dataset)  # type: ignore[arg-type]
    number = min(samples, count)
    chosen = [i * count // number for i in range(number)]
    logging.info(f"Standardising the teacher's features on {number} training samples")
    starts = tqdm(range(0, number, 16), desc="standardise", disable=None)
    batches = (collate([dataset[i] for i in chosen[at : at + 16]]) for at in starts)
    fit_on_batches(terms, teacher, requests, batches, device)


@torch.no_grad()
def fit_on_batches(
    terms: Sequence[Loss],
    teacher: Teacher,
    requests: Sequence[Request],
    batches: Iterable[Batch],
    device: torch.device,
) -> None:
    """Fix the standardisation of terms on what the teacher says of batches, in this process.

    Raises:
        UserError: structures that the teacher cannot take, features that do not vary.
    """
    for batch in batches:
        check_finite(batch, ())
        teacher.check_elements(batch.atomic_numbers)
        batch = batch.to(device)
        taught = teacher.teach(batch, requests, outputs=False).sound(())
        if taught.trusted is not None:  # what is not finite has no mean
            kept = taught.trusted.nonzero().flatten().tolist()
            if not kept:
                continue
            taught, batch = taught.of(kept), pick(batch, kept)
        for term in terms:
            term.update_statistics(taught.features, batch)
    for term in terms:
        term.finalize_statistics()
