"""Structures as they come, in one batch: the graphs that each of them has alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixCartesian,
    FixedLine,
    FixedPlane,
    FixScaled,
)
from ase.neighborlist import neighbor_list
from fairchem.core.common.utils import radius_graph_pbc
from fairchem.core.datasets import data_list_collater as stock_collater
from fairchem.core.preprocessing import AtomsToGraphs
from torch_geometric.data import Data

from fairchem_kd.analysis.physics.measure import free_atoms
from fairchem_kd.analysis.subjects.structures import to_sample
from fairchem_kd.errors import UserError
from fairchem_kd.stock.constraints import held, use_our_rule
from fairchem_kd.stock.graphs import radius_graph
from fairchem_kd.stock.neighbours import without_neighbours
from fairchem_kd.stock.samples import collate, fit_batch
from fairchem_kd.stock.structures import join, pick
from fairchem_kd.teachers.answers import structures_of

CUTOFF = 6.0


def sample(atoms: Atoms, sid: int = 0, *, pbc: bool = True, tags: Any = 2) -> Data:
    data = Data(
        pos=torch.tensor(atoms.positions, dtype=torch.float32),
        cell=torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(atoms.numbers),
        natoms=len(atoms),
        fixed=torch.zeros(len(atoms)),
        sid=sid,
        fid=0,
    )
    if tags is not None:
        data.tags = torch.full((len(atoms),), tags)
    if pbc:
        data.pbc = torch.tensor(atoms.pbc)[None]
    return data


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=7.0)
    atoms.rattle(0.05, seed=1)
    return atoms


def wire() -> Atoms:
    return Atoms("AuAg", positions=[[0, 0, 0], [2.6, 0.3, 0]], cell=[5.3, 0, 0], pbc=[1, 0, 0])


def skewed() -> Atoms:
    atoms = Atoms("CuH", positions=[[0, 0, 0], [0.9, 0.8, 1.2]])
    atoms.set_cell([[3.1, 0, 0], [1.4, 2.7, 0], [1.0, 0.7, 4.0]])
    atoms.pbc = [True, True, False]
    return atoms


STRUCTURES = {
    "slab": slab(),
    "molecule": molecule("CH3OH"),
    "boxed": Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]], cell=[8, 8, 8], pbc=False),
    "wire": wire(),
    "skewed": skewed(),
    "crystal": Atoms("NaCl", positions=[[0, 0, 0], [2.8, 0, 0]], cell=[5.6, 4.0, 4.0], pbc=True),
}


def edges(batch: Any) -> list[list[tuple[int, int, float]]]:
    """Of each structure: source, target and length of every edge that stock makes, sorted."""
    index, offsets, neighbours = radius_graph_pbc(copy.copy(batch), CUTOFF, 10**6)
    cells = torch.repeat_interleave(batch.cell.view(-1, 3, 3), neighbours, dim=0)
    shifts = torch.bmm(offsets.view(-1, 1, 3), cells).view(-1, 3)
    lengths = (batch.pos[index[0]] - batch.pos[index[1]] + shifts).norm(dim=1)
    start, found = 0, []
    for number, first in zip(neighbours.tolist(), batch.ptr.tolist(), strict=False):
        rows = range(start, start + number)
        found.append(
            sorted(
                (int(index[0, i]) - first, int(index[1, i]) - first, round(float(lengths[i]), 3))
                for i in rows
            )
        )
        start += number
    return found


def by_ase(atoms: Atoms) -> list[tuple[int, int, float]]:
    i, j, d = neighbor_list("ijd", atoms, CUTOFF)
    return sorted((int(b), int(a), round(float(x), 3)) for a, b, x in zip(i, j, d, strict=True))


def assert_edges(found: list[tuple[int, int, float]], expected: Any, name: str) -> None:
    assert [edge[:2] for edge in found] == [edge[:2] for edge in expected], name
    lengths = [[edge[2] for edge in some] for some in (found, expected)]
    assert np.allclose(np.sort(lengths[0]), np.sort(lengths[1]), atol=2e-3), name


@pytest.mark.parametrize("order", [1, -1])
def test_structures_of_any_periodicity_keep_their_graphs_in_one_batch(order: int) -> None:
    named = list(STRUCTURES.items())[::order]
    batch = collate([sample(atoms, i) for i, (_, atoms) in enumerate(named)], otf_graph=True)
    for (name, atoms), found in zip(named, edges(batch), strict=True):
        assert_edges(found, by_ase(atoms), name)


@pytest.mark.parametrize("complete", [False, True])
def test_molecules_that_say_nothing_of_periodicity_are_not_periodic(complete: bool) -> None:
    """A cell of zeros, or of unit vectors, as AtomsToGraphs writes it."""
    molecules = [molecule(name) for name in ("H2O", "CH4", "C2H6")]
    samples = [sample(atoms, pbc=False) for atoms in molecules]
    for one in samples:
        if complete:
            one.cell = torch.eye(3)[None]
    for atoms, found in zip(molecules, edges(collate(samples, otf_graph=True)), strict=True):
        assert_edges(found, by_ase(atoms), str(atoms.symbols))


def test_a_slab_without_pbc_and_a_molecule_without_either(
) -> None:  # fmt: skip
    atoms = slab()
    atoms.pbc = True
    atoms.cell[2, 2] = 30.0
    mixed = [sample(atoms, pbc=False), sample(molecule("CO"), pbc=False)]
    found = edges(collate(mixed, otf_graph=True))
    assert_edges(found[0], by_ase(atoms), "slab")
    assert_edges(found[1], by_ase(molecule("CO")), "molecule")


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_batch_of_one_kind_goes_through_untouched(name: str) -> None:
    if name in ("wire",):
        pytest.skip("its cell has no volume")
    samples = [sample(STRUCTURES[name], i) for i in range(3)]
    ours, stock = collate(samples, otf_graph=True), stock_collater(samples, otf_graph=True)
    for key, value in stock.to_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[key], value), key


def test_samples_themselves_are_left_as_they_are() -> None:
    samples = [sample(slab()), sample(molecule("CO"), tags=None)]
    before = [one.clone() for one in samples]
    collate(samples, otf_graph=True)
    for one, was in zip(samples, before, strict=True):
        assert set(one.keys()) == set(was.keys())
        assert torch.equal(one.cell, was.cell)


def test_what_some_samples_lack_a_batch_lacks_but_for_what_models_read() -> None:
    labelled, bare = sample(slab(), 3), sample(slab(), pbc=False, tags=None)
    labelled.energy, labelled.forces = 1.0, torch.zeros(8, 3)
    del bare["sid"], bare["fixed"]
    for order in ((labelled, bare), (bare, labelled)):
        batch = collate(order, otf_graph=True)
        assert not {"energy", "forces", "sid"} & set(batch.keys())
        assert batch.pbc.shape == (2, 3)
        assert batch.tags.shape == batch.fixed.shape == (16,)
    assert labelled.energy == 1.0
    assert collate([labelled, labelled], otf_graph=True).energy.tolist() == [1.0, 1.0]


def test_sets_that_differ_in_periodicity_are_joined() -> None:
    labelled = collate([sample(slab()), sample(slab())], otf_graph=True)  # T T F
    gas = collate([sample(molecule("CO"), pbc=False), sample(molecule("CO"), pbc=False)])
    whole = join([labelled, gas])
    for atoms, found in zip([slab(), slab(), molecule("CO"), molecule("CO")], edges(whole),
                            strict=True):  # fmt: skip
        assert_edges(found, by_ase(atoms), str(atoms.symbols))
    alike = join([labelled, pick(labelled, [0])])
    assert torch.equal(alike.cell[0], labelled.cell[0])
    assert fit_batch(alike) is alike


def test_a_flat_cell_is_refused_by_name() -> None:
    atoms = slab()
    atoms.set_cell([[5, 0, 0], [0, 5, 0], [5, 5, 0]])
    atoms.pbc = True
    with pytest.raises(UserError, match=r"Structure sid 7, fid 0 has a flat cell"):
        collate([sample(atoms, 7)], otf_graph=True)


@pytest.mark.parametrize("tags", [0, None])
def test_structures_without_tags_get_some(tags: int | None) -> None:
    atoms = slab()
    tagged = sample(atoms, tags=1)
    tagged.tags[0] = 0
    batch = collate(
        [sample(atoms, tags=tags), sample(molecule("CO"), tags=tags), tagged], otf_graph=True
    )
    parts = batch.tags.split(batch.natoms.tolist())
    assert parts[0].tolist() == [1] * 8
    assert parts[1].tolist() == [2] * 2
    assert parts[2].tolist() == [0] + [1] * 7


@pytest.mark.parametrize("most", [3, 100])
def test_graphs_without_periodicity_are_those_of_a_loop(most: int) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [1, 7, 30]
    pos = 8 * torch.rand(sum(sizes), 3, generator=draw)
    of = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    found = radius_graph(pos, r=3.0, batch=of, max_num_neighbors=most)
    expected = []
    for target in range(len(pos)):
        near = [
            (float((pos[target] - pos[source]).norm()), source)
            for source in range(len(pos))
            if source != target and of[source] == of[target]
        ]
        expected += [(s, target) for d, s in sorted(near)[:most] if d <= 3.0]
    assert [tuple(edge) for edge in found.T.tolist()] == expected
    assert radius_graph(pos[:0], 3.0, of[:0]).shape == (2, 0)


@pytest.mark.parametrize(
    ("atoms", "alone"),
    [
        (Atoms("H"), True),
        (Atoms("HH", positions=[[0, 0, 0], [0, 0, 10]]), True),
        (Atoms("HHH", positions=[[0, 0, 0], [0, 0, 10], [0, 0, 11]]), False),
        (Atoms("Cu", cell=[3, 3, 3], pbc=True), False),
        (Atoms("Cu", cell=[30, 30, 30], pbc=True), True),
        (Atoms("HH", positions=[[0, 0, 0], [0, 0, 10]], cell=[30, 30, 12], pbc=True), False),
        (molecule("H2O"), False),
    ],
)
def test_structures_without_neighbours_are_known(atoms: Atoms, alone: bool) -> None:
    assert without_neighbours(atoms, CUTOFF) is alone


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_a_structure_is_known_whatever_shares_its_batch(name: str) -> None:
    """A store's key: alone, among its like, and in a batch for which it got room."""
    alone = structures_of(collate([sample(STRUCTURES[name])]))[0].key()
    alike = structures_of(collate([sample(STRUCTURES[name], 1)] * 2))[1].key()
    mixed = structures_of(collate([sample(STRUCTURES[n]) for n in STRUCTURES]))
    assert alone == alike == mixed[list(STRUCTURES).index(name)].key()
    assert len({one.key() for one in mixed}) == len(STRUCTURES)


HELD = [
    ([FixAtoms([0, 2])], [1, 0, 1], False),
    ([FixCartesian(1)], [0, 1, 0], False),
    ([FixCartesian(1, (True, True, False))], [0, 0, 0], True),
    ([FixScaled([0, 1], (True, True, True))], [1, 1, 0], False),
    ([FixedPlane(2, (0, 0, 1))], [0, 0, 0], True),
    ([FixedPlane(2, (0, 0, 1)), FixedLine(2, (0, 0, 1))], [0, 0, 1], False),
    ([FixBondLength(0, 1), FixAtoms([2])], [0, 0, 1], True),
    ([], [0, 0, 0], False),
]


@pytest.mark.parametrize(("constraints", "fixed", "partly"), HELD)
def test_one_rule_says_which_atoms_are_held(
    constraints: list[Any], fixed: list[int], partly: bool
) -> None:
    """The same for `data convert`, for files that the commands read, and for stock's data sets."""
    atoms = Atoms("OHH", positions=[[0, 0, 0], [0.9, 0, 0], [0, 0.9, 0]], cell=[9, 9, 9])
    atoms.set_constraint(constraints)
    found, told = held(atoms)
    assert (found.tolist(), told) == (fixed, partly)
    use_our_rule()
    use_our_rule()
    assert AtomsToGraphs(r_edges=False, r_fixed=True).convert(atoms).fixed.tolist() == fixed
    assert to_sample(atoms).fixed.tolist() == fixed
    assert free_atoms(atoms).tolist() == [i for i in range(3) if not fixed[i]]


def test_tags_of_what_the_commands_read() -> None:
    """A molecule is an adsorbate also where it has got a cell with room."""
    assert to_sample(molecule("H2O")).tags.tolist() == [2, 2, 2]
    assert to_sample(bulk("Cu")).tags.tolist() == [1]
    tagged = molecule("H2O")
    tagged.set_tags([1, 2, 0])
    assert to_sample(tagged).tags.tolist() == [1, 2, 0]
