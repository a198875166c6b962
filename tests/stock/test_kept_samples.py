"""Samples that a training reads again are read once, and are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset
from trainings import write_lmdb

from fairchem_kd.stock.datasets import close_dataset, collate, open_in_order
from fairchem_kd.stock.kept_samples import KeptSamples, Room, memo_of, repeatable, size_of


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Any]:
    write_lmdb(tmp_path / "data", 7, 3)
    opened = open_in_order({"format": "lmdb", "src": str(tmp_path / "data")}, "train")
    yield opened
    close_dataset(opened.dataset)


class Counted(torch.utils.data.Dataset[Any]):
    """Counts what is read of a data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.read = dataset, [0] * len(dataset)
        self.config = dataset.config

    def __getitem__(self, index: int) -> Any:
        self.read[index] += 1
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


@pytest.mark.parametrize("within", [False, True])
def test_a_loader_reads_each_sample_once_and_gives_the_same(dataset: Any, within: bool) -> None:
    counted = Counted(dataset)
    given: Any = Subset(counted, range(len(counted))) if within else counted
    kept = KeptSamples(given, Room())
    for _ in range(3):
        ours = DataLoader(kept, batch_size=3, collate_fn=collate)
        theirs = DataLoader(dataset, batch_size=3, collate_fn=collate)
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for key in ("pos", "cell", "atomic_numbers", "energy", "forces", "natoms", "batch"):
                assert torch.equal(one[key], other[key]), key
    assert counted.read == [1] * 7


def test_what_is_set_on_a_sample_does_not_come_back(dataset: Any) -> None:
    kept = KeptSamples(dataset, Room())
    kept[2].extra = 1
    sample = kept[2]
    sample.pos = sample.pos + 1
    assert "extra" not in kept[2]
    assert torch.equal(kept[2].pos, dataset[2].pos)


def test_a_memo_is_that_of_the_sample_whatever_its_copies(dataset: Any) -> None:
    room = Room()
    kept = KeptSamples(dataset, room)
    first, again, other = memo_of(kept[1]), memo_of(kept[1]), memo_of(kept[2])
    assert first is not None
    assert first is again
    assert other is not first
    left = room.left
    first.keep("said", [1.5], 100)
    assert again is not None
    assert again.get("said") == [1.5]
    assert room.left == left - 100
    room.left = 50
    first.keep("more", [2.5], 100)
    assert first.get("more") is None
    batch = collate([kept[1], kept[2]])
    assert not any("memo" in key for key in batch.to_dict())
    assert memo_of(dataset[1]) is None


def test_no_more_is_kept_than_there_is_room_for(dataset: Any) -> None:
    counted = Counted(dataset)
    kept = KeptSamples(counted, Room(size_of(dataset[0]) + size_of(dataset[1])))
    for _ in range(2):
        for index in range(7):
            assert torch.equal(kept[index].pos, dataset[index].pos)
    assert counted.read == [1, 1, 2, 2, 2, 2, 2]


def test_a_sample_takes_at_least_its_numbers(dataset: Any) -> None:
    sample = dataset[0]
    numbers = sum(v.numel() * v.element_size() for _, v in sample if isinstance(v, torch.Tensor))
    assert numbers < size_of(sample) < numbers + 20_000


def test_only_what_gives_the_same_every_time(dataset: Any) -> None:
    assert repeatable(dataset)
    assert repeatable(Subset(dataset, [0, 1]))
    assert not repeatable([1, 2])
    assert not repeatable(Counted(dataset))  # a user's own: it might draw at random
    dataset.dataset.config["transforms"] = {"normalizer": {}, "rotate_at_random": {}}
    assert not repeatable(dataset)
