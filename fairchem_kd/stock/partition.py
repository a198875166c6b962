"""Which rank takes which structure of a global batch: stock's rule, without its compiler.

Stock compiles its two loops with numba when the first batch is drawn: some four seconds on every
rank at every start, for what takes Python less than a millisecond a batch. numba's sort is not
stable either; this one is, so that structures of one size are dealt out in the order of the batch.
"""

from __future__ import annotations

import heapq

import numpy as np
from fairchem.core.common import data_parallel
from numpy.typing import NDArray


def balanced_partition(sizes: NDArray[np.int_], num_parts: int) -> list[list[int]]:
    """The largest first, each to the part that has the least so far.

    Args:
        sizes: ``(B,)``, of the structures: numbers of atoms.
        num_parts: of ranks.

    Returns:
        Indices into ``sizes`` by part; the parts are in no order, but the same on every rank.
    """
    order = np.argsort(-np.asarray(sizes), kind="stable").tolist()
    parts = [(int(sizes[index]), [index]) for index in order[:num_parts]]
    heapq.heapify(parts)
    for index in order[num_parts:]:
        size, part = heapq.heappop(parts)
        heapq.heappush(parts, (size + int(sizes[index]), [*part, index]))
    return [part for _, part in parts]


def use_our_partition() -> None:
    """Have stock deal out batches with :func:`balanced_partition` from here on, in this process."""
    data_parallel._balanced_partition = balanced_partition
