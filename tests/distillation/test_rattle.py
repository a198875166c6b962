"""Rattled copies: their noise, their number and their guards."""

from __future__ import annotations

from typing import Any

import ase.geometry
import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from models import slabs
from torch_geometric.data import Batch

from fairchem_kd.distillation.companions import RattleOptions, Rattler
from fairchem_kd.errors import UserError
from fairchem_kd.schema import parse
from fairchem_kd.stock.structures import pick


def rattler(seed: int = 0, **options: Any) -> Rattler:
    return Rattler(parse(RattleOptions, options, "task.distillation.rattle"), seed)


def one_by_one(batch: Batch) -> dict[bytes, torch.Tensor]:
    """Each copy's displacement by the bytes of the positions of the clean structure nearest it."""
    return {p.numpy().tobytes(): p for p in batch.pos.split(batch.natoms.tolist())}


def test_noise_has_the_asked_for_spread_and_fixed_atoms_never_move() -> None:
    batch = slabs()
    moved = []
    for step in range(60):
        copies = rattler(copies=1, std=0.03, pool=None)(batch, step)
        assert copies is not None
        shift = copies.pos - batch.pos
        assert (shift[batch.fixed == 1] == 0).all()
        moved.append(shift[batch.fixed == 0])
    noise = torch.cat(moved)
    assert noise.std().item() == pytest.approx(0.03, rel=0.03)
    assert noise.mean(dim=0).abs().max() < 3 * 0.03 / len(noise) ** 0.5


def test_noise_is_a_function_of_seed_step_structure_and_copy() -> None:
    batch = slabs()
    first = rattler(copies=2, pool=None)(batch, 5)
    again = rattler(copies=2, pool=None)(batch, 5)
    assert torch.equal(first.pos, again.pos)
    for seed, step in ((0, 6), (1, 5)):
        other = rattler(seed, copies=2, pool=None)(batch, step)
        assert not torch.isclose(first.pos, other.pos).all(dim=1)[first.fixed == 0].any()
    parts = first.pos.split(first.natoms.tolist())
    assert not torch.equal(parts[0], parts[1])  # two copies of one structure


def test_copies_of_a_pool_repeat_and_are_those_of_other_runs() -> None:
    """What a teacher said of them can be read by runs of other seeds and lengths."""
    batch = slabs(3)
    pools = [one_by_one(rattler(pool=3).from_pool(batch, number)) for number in range(3)]
    everything = set().union(*pools)
    assert len(everything) == 9
    taken: set[bytes] = set()
    for seed in (0, 1):
        for step in range(20):
            taken |= set(one_by_one(rattler(seed, copies=1, pool=3)(batch, step)))
    assert taken == everything
    others = one_by_one(rattler(pool=3, pool_seed=1).from_pool(batch, 0))
    assert not everything & set(others)


def test_the_copies_of_a_pool_have_the_stds_in_turn() -> None:
    batch = slabs(4)
    make = rattler(std=[0.01, 0.1], pool=4)
    free = batch.fixed == 0
    for number, std in enumerate((0.01, 0.1, 0.01, 0.1)):
        moved = (make.from_pool(batch, number).pos - batch.pos)[free]
        assert moved.std().item() == pytest.approx(std, rel=0.15)


@pytest.mark.parametrize(("draws", "size"), [(float("inf"), 8), (4, 3), (0.2, 1)])
def test_a_pool_is_no_larger_than_what_a_training_uses(draws: float, size: int) -> None:
    assert Rattler(RattleOptions(pool=8), 0, draws).pool == size


def test_noise_depends_neither_on_the_rank_nor_on_the_place_in_the_batch() -> None:
    batch = slabs(6)
    whole = set(one_by_one(rattler(copies=1)(batch, 3)))
    apart: set[bytes] = set()
    for systems in ([4, 1, 5], [0, 3, 2]):  # two ranks with the same global batch
        apart |= set(one_by_one(rattler(copies=1)(pick(batch, systems), 3)))
    assert len(whole) == 6
    assert apart == whole


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    rattler()(slabs(), 1)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(("copies", "number"), [(0.5, 3), (1, 6), (0.25, 2), (2.5, 15)])
def test_the_number_of_copies_is_rounded_and_shared_out(copies: float, number: int) -> None:
    batch = slabs(6)
    chosen = []
    for step in range(4):
        made = rattler(copies=copies)(batch, step)
        assert len(made.natoms) == number
        counts = [made.sid.count(sid) for sid in batch.sid.tolist()]
        assert max(counts) - min(counts) <= 1
        chosen.append(counts)
    if number % 6:
        assert len({tuple(counts) for counts in chosen}) > 1  # not always the same ones


def test_no_copies_of_a_small_batch() -> None:
    assert rattler(copies=0.1)(slabs(2), 1) is None


def test_copies_keep_their_atoms_apart() -> None:
    batch = slabs(4)
    make = rattler(copies=8, std=0.35, min_distance=0.75)
    copies = make(batch, 1)
    closest = np.inf
    for system in range(len(copies.natoms)):
        rows = copies.batch == system
        radii = covalent_radii[copies.atomic_numbers[rows].int().numpy()]
        pos, cell = copies.pos[rows].double().numpy(), copies.cell[system].double().numpy()
        _, distances = ase.geometry.get_distances(pos, cell=cell, pbc=True)
        np.fill_diagonal(distances, np.inf)
        closest = min(closest, (distances / (radii[:, None] + radii[None])).min())
    assert 0.75 <= closest < 0.85
    assert 0 < len(copies.natoms) < 32  # the guard had something to do


def test_molecules_without_a_cell_are_not_wrapped() -> None:
    batch = slabs(2)
    batch.cell = torch.zeros_like(batch.cell)
    assert rattler(copies=1)(batch, 1) is not None


def test_a_std_that_breaks_every_distance_is_refused() -> None:
    with pytest.raises(UserError, match=r"std is 2 Å, which brings atoms closer .* smaller"):
        rattler(copies=4, std=2.0, min_distance=1.0)(slabs(4), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copies": -0.5}, "rattle.copies must be at least 0, not -0.5"),
        ({"std": 0}, "rattle.std must be greater than 0"),
        ({"std": [0.1, -1]}, "rattle.std must be greater than 0"),
        ({"pool": 0}, "rattle.pool must be at least 1"),
        ({"copy": 1}, r"unknown key 'copy' \(did you mean 'copies'\?\)"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rattler(**given)
