"""Batches joined and structures picked, as those of a batch made at once."""

from __future__ import annotations

import pytest
import torch
from models import samples, slabs
from torch_geometric.data import Batch

from fairchem_kd.errors import UserError
from fairchem_kd.stock.structures import join, pick


def test_joined_structures_are_those_of_a_batch_made_at_once() -> None:
    whole = samples(5)
    joined = join([Batch.from_data_list(whole[:2]), Batch.from_data_list(whole[2:])])
    expected = Batch.from_data_list(whole)
    for key in ("pos", "atomic_numbers", "tags", "fixed", "cell", "natoms", "batch", "ptr"):
        assert torch.equal(joined[key], expected[key]), key
    assert joined.num_graphs == 5
    assert not {"energy", "forces"} & set(joined.keys())


def test_picked_structures_come_in_the_order_asked_for() -> None:
    batch = slabs()
    picked = pick(batch, [2, 0, 2])
    parts = batch.pos.split(batch.natoms.tolist())
    assert torch.equal(picked.pos, torch.cat([parts[2], parts[0], parts[2]]))
    assert picked.natoms.tolist() == [len(parts[i]) for i in (2, 0, 2)]
    assert torch.equal(picked.cell, batch.cell[[2, 0, 2]])


def test_structures_without_a_key_of_the_others_are_refused() -> None:
    bare = slabs()
    del bare.fixed
    with pytest.raises(UserError, match="'fixed': write it into both"):
        join([slabs(), bare])
