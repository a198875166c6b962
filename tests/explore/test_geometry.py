"""Distances, gaps, and which structures are the same."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111, molecule

from fairchem_kd.explore.duplicates import Known
from fairchem_kd.explore.geometry import fingerprint, gap, pair_distances

SKEWED = np.array([[4.0, 0.0, 0.0], [3.2, 3.0, 0.0], [1.0, -2.5, 6.0]])


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]


def by_images(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The nearest of 11^3 images, in a loop."""
    shifts = [range(-5, 6) if periodic else (0,) for periodic in pbc]
    found = np.full((len(pos), len(pos)), np.inf)
    for i, j in product(range(len(pos)), repeat=2):
        if i != j:
            found[i, j] = min(
                np.linalg.norm(pos[i] - pos[j] + np.array(shift) @ cell)
                for shift in product(*shifts)
            )
    return found


@pytest.mark.parametrize("cell", [np.diag([5.0, 6.0, 7.0]), SKEWED, 4 * SKEWED])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_distances_are_to_the_nearest_image(cell: np.ndarray, pbc: tuple[bool, ...]) -> None:
    pos = np.random.default_rng(1).random((5, 3)) @ cell
    expected = by_images(pos, cell, np.array(pbc))
    found = pair_distances(pos, cell, np.array(pbc))
    near = expected < 5.0
    assert near.any()
    np.testing.assert_allclose(found[near], expected[near], atol=1e-10)
    assert (found[~near] > 5.0 - 1e-9).all()


def test_the_gap_is_the_least_reach_that_connects_all() -> None:
    chance = np.random.default_rng(0)
    for size in (1, 2, 7):
        pos = chance.normal(size=(size, 3)) * 3
        distances = pair_distances(pos, np.zeros((3, 3)), np.zeros(3, bool))

        def connected(reach: float, distances: np.ndarray = distances) -> bool:
            seen, waiting = {0}, [0]
            while waiting:
                for other in np.flatnonzero(distances[waiting.pop()] <= reach):
                    if other not in seen:
                        seen.add(int(other))
                        waiting.append(int(other))
            return len(seen) == len(distances)

        found = gap(distances)
        assert connected(found)
        assert size == 1 or not connected(found * 0.999)


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=8.0)
    atoms += Atoms("CO", [[1.3, 0.7, atoms.positions[:, 2].max() + 1.8]] * 2)
    atoms.positions[-1, 2] += 1.15
    atoms.pbc = True
    return atoms


def moved(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turned, mirrored, shifted, and with its atoms in another order."""
    turn, order = rotation(3), np.random.default_rng(4).permutation(len(atoms))
    pos = (atoms.positions @ turn.T + [0.3, -1.2, 2.0])[order]
    return atoms.numbers[order], pos, np.array(atoms.cell) @ turn.T, atoms.pbc


@pytest.mark.parametrize("atoms", [slab(), molecule("CH3CH2OH")])
def test_a_fingerprint_stays_when_a_structure_is_moved(atoms: Atoms) -> None:
    print_ = fingerprint(
        atoms.numbers, pair_distances(atoms.positions, np.array(atoms.cell), atoms.pbc)
    )
    numbers, pos, cell, pbc = moved(atoms)
    again = fingerprint(numbers, pair_distances(pos, cell, pbc))
    np.testing.assert_allclose(again, print_, atol=1e-9)


def test_a_pair_of_elements_differs_by_the_wasserstein_distance() -> None:
    """Of few distances, read at many places; in a loop over sorted ones."""
    chance = np.random.default_rng(5)
    one, other = chance.normal(size=(2, 9, 3)) * 2
    prints = [
        fingerprint(np.full(9, 6), pair_distances(pos, np.zeros((3, 3)), np.zeros(3, bool)))
        for pos in (one, other)
    ]
    lists = [
        sorted(np.linalg.norm(pos[i] - pos[j]) for i in range(9) for j in range(i))
        for pos in (one, other)
    ]
    exact = np.sqrt(np.mean([(a - b) ** 2 for a, b in zip(*lists, strict=True)]))
    near = np.sqrt(np.square(prints[0] - prints[1]).mean())
    assert near == pytest.approx(exact, rel=0.1)


def test_what_was_moved_is_known_and_what_was_changed_is_not() -> None:
    atoms, known = slab(), Known(0.01)
    cell = np.array(atoms.cell)
    assert not known.has(atoms.numbers, atoms.positions, cell, atoms.pbc)
    known.add(atoms.numbers, atoms.positions, cell, atoms.pbc)
    assert known.has(atoms.numbers, atoms.positions + 1e-3, cell, atoms.pbc)
    turn = rotation(0)
    kind = {"pbc": np.zeros(3, bool), "cell": np.zeros((3, 3))}
    cluster = molecule("CH3OH")
    known.add(cluster.numbers, cluster.positions, **kind)
    assert known.has(cluster.numbers[::-1], (cluster.positions @ turn.T)[::-1], **kind)
    for scale, expected in ((0.002, True), (0.1, False)):
        noise = scale * np.random.default_rng(2).standard_normal(cluster.positions.shape)
        assert known.has(cluster.numbers, cluster.positions + noise, **kind) is expected
    stretched = atoms.copy()
    stretched.positions[-1, 2] += 0.15  # one adsorbate's atom among many of metal
    assert not known.has(stretched.numbers, stretched.positions, cell, stretched.pbc)
    other = cluster.numbers.copy()
    other[other == 8] = 16
    assert not known.has(other, cluster.positions, **kind)
    assert not known.has(atoms.numbers, atoms.positions, 1.1 * cell, atoms.pbc)


def test_at_zero_nothing_is_known() -> None:
    known = Known(0.0)
    where = (np.array([1, 1]), np.eye(3)[:2], np.zeros((3, 3)), np.zeros(3, bool))
    known.add(*where)
    assert not known.has(*where)


def test_an_edge_that_is_missing_leaves_the_others_periodic() -> None:
    cell, pbc = np.diag([5.0, 6.0, 0.0]), np.array([True, True, False])
    pos = np.array([[0.2, 0.3, 1.0], [4.8, 5.9, 2.0]])
    assert pair_distances(pos, cell, pbc)[0, 1] == pytest.approx(np.sqrt(0.4**2 + 0.4**2 + 1))
