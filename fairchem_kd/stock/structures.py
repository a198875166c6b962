"""Batches of bare structures: what a model reads of them, joined and picked without labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.stock.samples import fit_batch

#: What fairchem's models read: one row per atom, and one row per system (pbc is optional).
ATOM_KEYS = ("pos", "atomic_numbers", "tags", "fixed")
SYSTEM_KEYS = ("cell", "natoms", "pbc")
NAME_KEYS = ("sid", "fid")


def join(batches: Sequence[Batch]) -> Batch:
    """The structures of several batches in one, in their order and without their labels.

    Raises:
        UserError: a key that one batch has and another lacks.
    """
    joined = Batch()
    for key in (*ATOM_KEYS, *SYSTEM_KEYS):
        having = [key in batch and batch[key] is not None for batch in batches]
        if not any(having):
            continue
        if key == "pbc" and not all(having):
            batches = [_with_pbc(batch) for batch in batches]
        elif not all(having):
            raise UserError(
                f"task.distillation.unlabelled.dataset: its structures and the labelled ones do "
                f"not both have '{key}': write it into both data sets."
            )
        values = [batch[key] for batch in batches]
        joined[key] = torch.cat([_rows(key, value) for value in values])
    for key in NAME_KEYS:
        if all(key in batch for batch in batches):
            joined[key] = [name for batch in batches for name in names(batch, key)]
    return fit_batch(_indexed(joined))


def _with_pbc(batch: Batch) -> Batch:
    """The batch; where it does not say, periodic along the axes that its cells have edges for."""
    if batch.get("pbc") is not None:
        return batch
    batch = copy.copy(batch)
    batch.pbc = batch.cell.view(-1, 3, 3).norm(dim=2) > 0
    return batch


def pick(batch: Batch, systems: Sequence[int], **values: Tensor) -> Batch:
    """The structures ``systems`` of a batch, in that order, as often as they are named.

    Args:
        values: per-atom tensors to put in place of the batch's own, already picked.
    """
    natoms = batch.natoms.tolist()
    starts = [0]
    for number in natoms:
        starts.append(starts[-1] + number)
    rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in systems])
    rows = rows.to(batch.pos.device)
    picked = Batch()
    for key in ATOM_KEYS:
        if key in values:
            picked[key] = values[key]
        elif key in batch:
            picked[key] = batch[key][rows]
    chosen = torch.tensor(systems, dtype=torch.long, device=batch.pos.device)
    for key in SYSTEM_KEYS:
        if key in batch and batch[key] is not None:
            picked[key] = _rows(key, batch[key])[chosen]
    for key in NAME_KEYS:
        if key in batch:
            of_batch = names(batch, key)
            picked[key] = [of_batch[s] for s in systems]
    return _indexed(picked)


def names(batch: Batch, key: str) -> list[Any]:
    """``sid`` or ``fid`` of each structure, which a collater leaves as a list or as a tensor."""
    value = batch[key]
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _rows(key: str, value: Tensor) -> Tensor:
    shapes = {"cell": (-1, 3, 3), "pbc": (-1, 3), "natoms": (-1,)}
    return value.view(shapes[key]) if key in shapes else value


def _indexed(batch: Batch) -> Batch:
    """With the bookkeeping of a PyG batch: ``batch`` ``(N,)``, ``ptr`` ``(B + 1,)``."""
    natoms = batch.natoms
    systems = torch.arange(len(natoms), device=natoms.device)
    batch.batch = torch.repeat_interleave(systems, natoms)
    batch.ptr = torch.cat([natoms.new_zeros(1), natoms.cumsum(0)])
    batch._num_graphs = len(natoms)
    return batch
