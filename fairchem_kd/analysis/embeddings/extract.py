"""A model's features of structures, batch by batch: embeddings for whatever comes after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fairchem_kd.features import FeatureExtractor, Request, available_features
from fairchem_kd.features.address import parse_address
from fairchem_kd.stock.structures import names

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.analysis.subjects.structures import Structures
    from fairchem_kd.models.frozen import Teacher

Pool = Literal["mean", "sum"]


@dataclass(frozen=True)
class Chunk:
    """The features of some structures, in the order of the data.

    ``features`` by address: ``(N, C)`` or, of vectors, ``(N, 3, C)``, fp32; of pooled features
    the first axis is that of the B structures.
    """

    sid: list[Any]
    fid: list[Any]
    natoms: NDArray[np.int64]  #: (B,)
    atomic_numbers: NDArray[np.int64]  #: (N,)
    features: dict[str, NDArray[np.float32]]
    pooled: bool


def feature_tap(model: torch.nn.Module, addresses: Sequence[str]) -> FeatureExtractor:
    """Taps for ``addresses``: node features and vectors as they are, edge features summed.

    ``edge`` and ``edge@k`` are summed onto their target atoms; ``vector@k`` of GemNet-OC are its
    edge features times the edges' unit vectors, summed in the same way.

    Raises:
        UserError: an address that the model does not offer.
    """
    specs = available_features(model)
    requests = []
    for address in dict.fromkeys(addresses):
        first = parse_address(address)[0]
        is_vector = first in specs and specs[first].kind == "vector"
        requests.append(Request(address, "vector" if is_vector else "node"))
    return FeatureExtractor(model, requests)


def extract_features(
    model: Teacher,
    structures: Structures,
    tap: FeatureExtractor,
    *,
    pool: Pool | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Iterator[Chunk]:
    """Run ``model`` over ``structures``, one batch after the other.

    Args:
        model: as :func:`fairchem_kd.analysis.subjects.runs.load_model` gives it, on its device.
        structures: which need no labels.
        tap: as :func:`feature_tap` makes it for ``model.model``.
        pool: the mean or the sum over each structure's atoms, in place of a row for every atom.
        batch_size: structures at a time.
        progress: show a bar on a terminal.

    Raises:
        UserError: structures that cannot be read, or that the model does not know.
    """
    device = next(model.model.parameters()).device
    bar = tqdm(total=structures.count, desc="features", disable=None if progress else True)
    seen = 0
    for batch in structures.batches(batch_size):
        model.check_elements(batch.atomic_numbers)
        captured = model.forward(batch.to(device), tap).features
        assert captured is not None
        values = {request.address: captured[request].values for request in tap.specs}
        if pool is not None:
            values = {name: _pooled(value, batch, pool) for name, value in values.items()}
        count = batch.natoms.numel()
        yield Chunk(
            sid=_names(batch, "sid", seen),
            fid=_names(batch, "fid", 0),
            natoms=batch.natoms.cpu().numpy().astype(np.int64),
            atomic_numbers=batch.atomic_numbers.cpu().numpy().astype(np.int64),
            features={name: value.float().cpu().numpy() for name, value in values.items()},
            pooled=pool is not None,
        )
        seen += count
        bar.update(count)
    bar.close()


def _pooled(values: Tensor, batch: Batch, pool: Pool) -> Tensor:
    """``(N, ...)`` to ``(B, ...)``, summed in float64."""
    total = values.new_zeros((batch.natoms.numel(), *values.shape[1:]), dtype=torch.float64)
    total.index_add_(0, batch.batch, values.double())
    if pool == "mean":
        total /= batch.natoms.view(-1, *(1,) * (values.dim() - 1))
    return total


def _names(batch: Batch, key: str, first: int) -> list[Any]:
    """``sid`` or ``fid`` of every structure; where the data have none, ``sid`` is its number."""
    count = batch.natoms.numel()
    if key in batch and batch[key] is not None:
        return names(batch, key)
    return [first + i if key == "sid" else 0 for i in range(count)]
