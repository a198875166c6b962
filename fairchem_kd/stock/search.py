"""How much stock's neighbour search takes, worked out before it is done.

It compares every atom of a structure with every other in every image within the cutoff, all at
once, with as many images for each structure as the one of the batch that needs most: a thousand
atoms in a cell of a few Å are billions of distances, and hundreds of gigabytes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairchem.core.models import base
from numpy.typing import NDArray

from fairchem_kd.errors import UserError
from fairchem_kd.machine import free_memory
from fairchem_kd.stock.neighbours import name_of
from fairchem_kd.stock.pairs import MEND, repetitions

BYTES = 96  # of each distance, at the peak of the search; measured
SMALL = 1 << 30  # bytes of which nobody asks whether they are free
MANY = 100_000_000  # distances of which it is told: tens of seconds on a core

Array = NDArray[Any]


def distances(natoms: Sequence[int] | Array, cells: Array, pbc: Array, cutoff: float) -> float:
    """How many distances the search in a batch of B structures works out, all at once.

    Args:
        natoms: of each.
        cells: Å, ``(B, 3, 3)``.
        pbc: ``(B, 3)``.
        cutoff: Å.
    """
    images = np.prod(2 * repetitions(cells, pbc, cutoff).max(axis=0) + 1)
    return float((np.asarray(natoms, float) ** 2).sum() * images)


def too_much(count: float, device: torch.device) -> str:
    """Why so many distances cannot be worked out there; empty where they can."""
    need = count * BYTES
    if need < SMALL:
        return ""
    free = free_memory(device)
    if free is None or need < free:
        return ""
    return (
        f"{count:.1e} distances, and about {need / 1e9:,.0f} GB where {free / 1e9:,.0f} GB are free"
    )


def check_batch(batch: Any, cutoff: float) -> None:
    """Refuse a batch whose search does not fit into memory, and tell of one that takes long.

    Raises:
        UserError: naming its densest structure.
    """
    cells = batch.cell.detach().view(-1, 3, 3).double().cpu().numpy()
    given = batch.get("pbc") if hasattr(batch, "get") else None
    pbc = np.ones((len(cells), 3), bool)
    if given is not None:
        pbc = given.view(-1, 3).bool().cpu().numpy()
    natoms = batch.natoms.cpu().numpy()
    count = distances(natoms, cells, pbc, cutoff)
    if count * BYTES < SMALL:
        return
    own = natoms.astype(float) ** 2 * np.prod(2 * repetitions(cells, pbc, cutoff) + 1, axis=1)
    worst = int(own.argmax())
    what = (
        f"a batch of {len(natoms)} structures, of which {name_of(batch, worst)} has "
        f"{int(natoms[worst])} atoms in {abs(np.linalg.det(cells[worst])):.3g} Å^3"
    )
    if problem := too_much(count, batch.pos.device):
        raise UserError(f"The neighbours within {cutoff:g} Å of {what}, take {problem}: {MEND}.")
    if count > MANY and batch.pos.device.type == "cpu":
        _tell(f"The neighbours within {cutoff:g} Å of {what}, take {count:.1e} distances: {MEND}.")


@functools.cache
def _tell(text: str) -> None:
    logging.warning(text)


def distances_of(sample: Any, cutoff: float) -> float:
    """How many distances the search in one sample takes by itself."""
    cell = np.asarray(sample.cell, float).reshape(1, 3, 3)
    given = getattr(sample, "pbc", None)
    pbc = np.ones((1, 3), bool) if given is None else np.asarray(given, bool).reshape(1, 3)
    return distances([len(sample.pos)], cell, pbc, cutoff)


def look_before_searching() -> None:
    """Have stock's models refuse what would not end, in this process and its workers."""
    original = base.radius_graph_pbc
    if getattr(original, "looks", False):
        return

    @functools.wraps(original)
    def radius_graph_pbc(data: Any, radius: float, *more: Any, **options: Any) -> Any:
        check_batch(data, float(radius))
        return original(data, radius, *more, **options)

    radius_graph_pbc.looks = True  # type: ignore[attr-defined]
    base.radius_graph_pbc = radius_graph_pbc
