"""Structures made fit for stock's models when they become a batch: periodicity and tags.

Stock's collater takes structures as they come, and its models take one periodicity for a whole
batch, that of its first structure or none at all, and an empty cell for a periodic one. So that a
prediction does not depend on what shares its batch, structures of a batch that are not all alike
are made periodic along all axes here, with room along those that were not: no image is in reach
along such an axis, and the graph is the right one. A batch whose structures are alike and have
cells goes through untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairchem.core import datasets
from fairchem.core.common.relaxation import ase_utils, ml_relaxation
from fairchem.core.datasets import data_list_collater as stock_collater
from fairchem.core.datasets import lmdb_dataset
from fairchem.core.modules.normalization import element_references, normalizer
from fairchem.core.trainers import base_trainer
from numpy.typing import NDArray
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.stock.periodicity import alike, axes, everywhere, room, tags_of

_SINGLE = ("pos", "cell")  # what models multiply with weights
_MADE_UP = frozenset({"pbc", "tags"})  # where a sample lacks them
#: Every module in which stock looks its collater up.
_USERS = (
    *(datasets, lmdb_dataset, base_trainer),
    *(ase_utils, ml_relaxation, element_references, normalizer),
)


def collate(samples: Sequence[Any], otf_graph: bool = False, to_dict: bool = False) -> Any:
    """Stock's ``data_list_collater``, of structures that are fit for stock's models.

    Raises:
        UserError: naming a structure whose cell is flat along periodic axes.
    """
    return stock_collater(fit(samples), otf_graph=otf_graph, to_dict=to_dict)


def use_our_collater() -> None:
    """Have stock collate with :func:`collate` from here on, in this process and its workers."""
    for module in _USERS:
        module.data_list_collater = collate


def fit(samples: Sequence[Any]) -> Sequence[Any]:
    """``samples``, or copies of them that are alike in periodicity, and have what models read.

    What some of them lack, labels for example, the copies of the others lack too.
    """
    samples = _with_the_same([_in_form(one) for one in samples])
    same = alike([_pbc(one) for one in samples], [_cell(one) for one in samples])
    untagged = [_untagged(one) for one in samples]
    if same and not any(untagged):
        return samples
    made = []
    for sample, lacks in zip(samples, untagged, strict=True):
        one = copy.copy(sample)
        if lacks:
            one.tags = torch.from_numpy(tags_of(len(sample.pos), bool(_periodic(sample).any())))
        if not same:
            one.cell, one.pbc = _in_room(sample)
        made.append(one)
    return made


def _in_form(sample: Any) -> Any:
    """A sample, or a copy of it with what stock's writers give: single precision, ``fixed``, ...

    Without ``fixed`` every atom is free.
    """
    changes: dict[str, Any] = {}
    for key in _SINGLE:
        value = getattr(sample, key, None)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            changes[key] = value.float()
    cell = changes.get("cell", getattr(sample, "cell", None))
    if isinstance(cell, torch.Tensor) and cell.dim() == 2:
        changes["cell"] = cell[None]
    if getattr(sample, "fixed", None) is None:
        changes["fixed"] = torch.zeros(len(sample.pos))
    if not changes:
        return sample
    made = copy.copy(sample)
    for key, value in changes.items():
        made[key] = value
    return made


def _with_the_same(samples: Sequence[Any]) -> Sequence[Any]:
    """The samples, or copies without what not all of them have: labels of some, a name, ...

    Periodicity and tags stay, which are made up for below. Whoever needs labels misses them.
    """
    held = [frozenset(one.keys()) for one in samples]
    if len(set(held)) < 2:
        return samples
    common = frozenset.intersection(*held) | _MADE_UP
    made = []
    for sample, own in zip(samples, held, strict=True):
        one = copy.copy(sample)
        for key in own - common:
            del one[key]
        made.append(one)
    return made


def fit_batch(batch: Batch) -> Batch:
    """A batch in host memory that was put together of several, made alike in periodicity."""
    if batch.get("cell") is None:
        return batch
    cells = [cell.double().numpy() for cell in batch.cell.view(-1, 3, 3)]
    given = batch.get("pbc")
    pbcs = [None] * len(cells) if given is None else [one.numpy() for one in given.view(-1, 3)]
    if alike(pbcs, cells):
        return batch
    stops = batch.natoms.cumsum(0).tolist()
    made = []
    for cell, pbc, natoms, stop in zip(cells, pbcs, batch.natoms.tolist(), stops, strict=True):
        pos = batch.pos[stop - natoms : stop].double().numpy()
        made.append(room(cell, axes(pbc, cell), pos))
    batch.cell = torch.from_numpy(np.stack(made)).to(batch.cell.dtype)
    batch.pbc = torch.ones(len(cells), 3, dtype=torch.bool)
    return batch


def _pbc(sample: Any) -> NDArray[Any] | None:
    given = getattr(sample, "pbc", None)
    return None if given is None else np.asarray(given, dtype=bool).reshape(3)


def _cell(sample: Any) -> NDArray[np.float64]:
    return np.asarray(sample.cell, dtype=np.float64).reshape(3, 3)


def _periodic(sample: Any) -> NDArray[np.bool_]:
    return axes(_pbc(sample), _cell(sample))


def _in_room(sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cell = _cell(sample)
    try:
        made = everywhere(cell, _pbc(sample), sample.pos)
    except ValueError as error:
        raise UserError(
            f"Structure {_name(sample)} has a flat cell ({cell.round(3).tolist()}): its vectors "
            "lie in a plane; mend the sample's cell, or its pbc."
        ) from error
    dtype = torch.as_tensor(sample.cell).dtype
    return torch.from_numpy(made).to(dtype)[None], torch.ones(1, 3, dtype=torch.bool)


def _untagged(sample: Any) -> bool:
    tags = getattr(sample, "tags", None)
    return tags is None or not bool(torch.as_tensor(tags).any())


def _name(sample: Any) -> str:
    named = {key: getattr(sample, key, None) for key in ("sid", "fid")}
    words = [f"{key} {value}" for key, value in named.items() if value is not None]
    return ", ".join(words) or "without a name"
