"""Samples kept in memory once they have been read, for data sets that fit.

Stock unpickles a sample of an LMDB anew at every step. For small structures that takes as long as a
small model's own forward: each of a sample's dozen tensors goes through ``torch.load``. Loader
workers do it in parallel; where the training process reads for itself, what it has read is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

#: Bytes that the samples of all data sets of a process may take together.
LIMIT = 512 * 2**20
_OBJECT = 600  # bytes that a tensor takes beside its numbers, roughly

#: Stock's transforms, which give the same for the same sample whenever they are asked.
_REPEATABLE = {"normalizer", "element_references", "decompose_tensor"}


class Room:
    """How many bytes are left for samples."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.left = limit

    def take(self, bytes_: int) -> bool:
        """Whether there was room for so many; then they are taken."""
        if bytes_ > self.left:
            return False
        self.left -= bytes_
        return True


class Memo:
    """What others found out about a kept sample, as long as there is room for it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._known: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        return self._known.get(key)

    def keep(self, key: Any, value: Any, bytes_: int) -> None:
        if self._room.take(bytes_):
            self._known[key] = value


_MEMO = "_fairchem_kd_memo"  # beside a sample's values, so that no batch has it


def memo_of(sample: Any) -> Memo | None:
    """The memo of a sample that is kept, and of its copies; None of any other."""
    return getattr(sample, "__dict__", {}).get(_MEMO)


class KeptSamples(Dataset[Any]):
    """``dataset``, whose samples are read once as long as there is room for them.

    Args:
        dataset: gives the same sample for the same index every time.
        room: shared with other data sets.
    """

    def __init__(self, dataset: Any, room: Room) -> None:
        self.dataset = dataset
        self._room = room
        self._kept: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        kept = self._kept.get(index)
        if kept is None:
            kept = self.dataset[index]
            if self._room.take(size_of(kept)):
                self._kept[index] = kept
                kept.__dict__[_MEMO] = Memo(self._room)
        return copy.copy(kept)  # whoever gets it may set attributes

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]  # not the data set's own, which would read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while unpickling there is none yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


def repeatable(dataset: Any) -> bool:
    """Whether a data set of stock's gives the same sample for the same index every time."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    settings = getattr(dataset, "config", None)
    if not isinstance(settings, Mapping):
        return False
    ours = type(dataset).__module__.startswith("fairchem.core.datasets.")
    return ours and set(settings.get("transforms") or {}) <= _REPEATABLE


def size_of(sample: Any) -> int:
    """Bytes that a sample takes, roughly."""
    values = (value for _, value in sample)
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(one.numel() * one.element_size() + _OBJECT for one in tensors) + _OBJECT
