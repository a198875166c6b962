"""The collisions recipe: GFN2-xTB labels of molecules flying at each other."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from ase import units
from ase.data import atomic_masses
from torch_geometric.data import Data

from fairchem_kd.data.create import create
from fairchem_kd.data.recipes import collisions
from fairchem_kd.data.recipes.registry import parse_options

pytest.importorskip("tblite", reason="the labels come from tblite")

SIZES = {"train": 36, "val": 8, "test": 8, "test_ood": 8}


def samples(folder: Path) -> list[Data]:
    environment = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, readonly=True, lock=False)
    with environment.begin() as transaction:
        length = pickle.loads(transaction.get(b"length"))
        found = [pickle.loads(transaction.get(str(i).encode())) for i in range(length)]
    environment.close()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collisions") / "collisions"
    create(parse_options({"recipe": "collisions", **SIZES}, "build"), root, 2)
    return root


def test_labels_equal_an_independent_tblite_calculation(root: Path) -> None:
    from tblite.interface import Calculator

    card = json.loads((root / "card.json").read_text("utf-8"))
    references = {int(z): value for z, value in card["reference_energies"].items()}
    for split in SIZES:
        for data in samples(root / split)[::4]:
            numbers = data.atomic_numbers.numpy()
            pos = data.pos.numpy().astype(float) / units.Bohr
            calculator = Calculator("GFN2-xTB", numbers, pos)
            calculator.set("verbosity", 0)
            result = calculator.singlepoint()
            energy = data.energy + sum(references[z] for z in numbers.tolist())
            forces = -result.get("gradient") * units.Hartree / units.Bohr
            assert float(result.get("energy")) * units.Hartree == pytest.approx(energy, abs=1e-6)
            np.testing.assert_allclose(data.forces.numpy(), forces, atol=1e-5)


def test_forces_are_the_negative_gradient_of_the_energy(root: Path) -> None:
    data = samples(root / "train")[7]
    numbers, pos = data.atomic_numbers.numpy(), data.pos.numpy().astype(float)
    xtb, step = collisions.Xtb(numbers, pos), 1e-3
    for atom, axis in ((0, 0), (1, 2), (len(numbers) - 1, 1)):
        ends = []
        for sign in (1.0, -1.0):
            moved = pos.copy()
            moved[atom, axis] += sign * step
            ends.append(xtb(moved, restart=False)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert data.forces[atom, axis].item() == pytest.approx(-slope, abs=2e-3)


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(
    root: Path, tmp_path: Path
) -> None:
    sizes = {"train": 24, "val": 3, "test": 3, "test_ood": 3}
    create(parse_options({"recipe": "collisions", **sizes}, "build"), tmp_path / "again", 1)
    for split in SIZES:
        for ours, theirs in zip(samples(tmp_path / "again" / split), samples(root / split),
                                strict=False):  # fmt: skip
            assert torch.equal(ours.pos, theirs.pos)
            assert torch.equal(ours.forces, theirs.forces)
            assert (ours.sid, ours.fid) == (theirs.sid, theirs.fid)


def test_samples_are_molecules_in_a_large_cell(root: Path) -> None:
    for split in SIZES:
        for data in samples(root / split):
            assert data.tags.tolist() == [2] * data.natoms
            assert data.fixed.sum() == 0
            assert torch.equal(data.cell[0], torch.eye(3) * collisions.CELL)
            assert data.pbc.all()
            assert set(data.atomic_numbers.tolist()) <= {1, 6, 7, 8}
            spread = data.pos.max(dim=0).values - data.pos.min(dim=0).values
            assert (collisions.CELL - spread > 12.0).all()  # OC20's largest cutoff
            assert np.isfinite(data.energy)
            assert data.forces.norm(dim=1).max() < collisions.MAX_FORCE
            # An isolated system: no net force.
            assert data.forces.sum(dim=0).abs().max() < 1e-3
            distances = torch.cdist(data.pos.double(), data.pos.double())
            assert (distances + 10 * torch.eye(data.natoms)).min() > 0.5
    sids = [set(np.load(root / split / "metadata.npz")["sid"].tolist()) for split in SIZES]
    assert len(set.union(*sids)) == sum(len(part) for part in sids)


def test_only_test_ood_has_the_held_out_molecules(root: Path) -> None:
    for split in SIZES:
        pairs = np.load(root / split / "metadata.npz")["molecules"].tolist()
        for pair in pairs:
            held_out = set(pair.split("+")) & set(collisions.HELD_OUT)
            assert bool(held_out) == (split == "test_ood"), pair


def test_pairs_start_apart_and_fly_at_each_other() -> None:
    for seed in range(10):
        names, pair, velocity = collisions.draw_pair(np.random.default_rng(seed), seed % 2 == 1)
        masses = atomic_masses[pair.numbers][:, None]
        assert np.abs((masses * velocity).sum(axis=0)).max() < 1e-12
        first = len(collisions.molecule(names.split("+")[0]))
        sizes = {first, len(pair) - first}
        for size in sizes:  # the names are sorted, the molecules are not
            a, b = slice(0, size), slice(size, None)
            gap, speed = [
                (masses[b] * x[b]).sum(axis=0) / masses[b].sum()
                - (masses[a] * x[a]).sum(axis=0) / masses[a].sum()
                for x in (pair.positions, velocity)
            ]
            if abs(gap[2] - collisions.SEPARATION) < 1e-6:
                assert np.abs(gap[:2]).max() <= 0.8
                assert -0.06 <= speed[2] <= -0.02
                assert np.abs(speed[:2]).max() < 1e-9
                break
        else:
            pytest.fail(f"{names} do not start {collisions.SEPARATION} Å apart")


def test_the_dynamics_conserve_energy() -> None:
    """The potential and kinetic energies of a collision, from the positions alone."""
    trajectory = collisions.make_trajectory(0, 0, 2, held_out=False)
    _, pair, velocity = collisions.draw_pair(np.random.default_rng([0, 0, 2]), False)
    masses = pair.get_masses()[:, None]
    pos, xtb = pair.positions.copy(), collisions.Xtb(pair.numbers, pair.positions)
    seen, totals = [], []
    energy, forces = xtb(pos)
    for step in range(collisions.CANDIDATES * collisions.STRIDE):
        if step % collisions.STRIDE == 0:
            kinetic = 0.5 * (masses * (velocity / units.fs) ** 2).sum()
            totals.append(energy + kinetic)
            seen.append(pos.copy())
        half = velocity + 0.5 * collisions.TIME_STEP * forces / masses * units.fs**2
        pos = pos + collisions.TIME_STEP * half
        energy, forces = xtb(pos)
        velocity = half + 0.5 * collisions.TIME_STEP * forces / masses * units.fs**2
    assert np.ptp(totals) < 0.02
    assert len(trajectory.frames) == collisions.FRAMES_PER_TRAJECTORY
    for frame in trajectory.frames:
        nearest = min(np.abs(frame.pos - positions).max() for positions in seen)
        assert nearest < 1e-4


def test_a_calculation_that_does_not_converge_is_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tblite itself is made to fail, by one SCF cycle being all it may take."""
    original = collisions.Xtb.__init__

    def impatient(self: collisions.Xtb, numbers: np.ndarray, pos: np.ndarray) -> None:
        original(self, numbers, pos)
        self.calculator.set("max-iter", 1)

    frame = collisions.make_trajectory(0, 0, 0, held_out=False).frames[0]
    monkeypatch.setattr(collisions.Xtb, "__init__", impatient)
    trajectory = collisions.make_trajectory(0, 0, 0, held_out=False)
    assert trajectory.frames == []
    assert trajectory.skipped == {"SCF not converged during the dynamics": 1}
    xtb = collisions.Xtb(frame.numbers, frame.pos.astype(float))
    assert collisions.label(xtb, frame.numbers, frame.pos.astype(float)) == (
        None,
        "SCF not converged",
    )
