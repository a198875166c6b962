"""The slabs recipe, from the samples that a user's training would read."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.data import chemical_symbols, covalent_radii
from fairchem.core.common.data_parallel import BalancedBatchSampler
from fairchem.core.datasets import data_list_collater
from fairchem.core.datasets.base_dataset import create_dataset
from torch_geometric.data import Data

from fairchem_kd.data.create import create
from fairchem_kd.data.recipes import slabs
from fairchem_kd.data.recipes.registry import parse_options

SIZES = {"train": 60, "val": 12, "test": 12, "test_ood": 30}
QUARTERS = ("train_1of4", "train_2of4", "train_3of4")


def make(root: Path, processes: int, seed: int = 0, **sizes: int) -> Path:
    create(
        parse_options({"recipe": "slabs", "seed": seed, **(sizes or SIZES)}, "b"), root, processes
    )
    return root


def samples(folder: Path) -> list[Data]:
    environment = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, readonly=True, lock=False)
    with environment.begin() as transaction:
        length = pickle.loads(transaction.get(b"length"))
        found = [pickle.loads(transaction.get(str(i).encode())) for i in range(length)]
        assert environment.stat()["entries"] == length + 1
    environment.close()
    return found


def card_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "card.json").read_text("utf-8"))


def fingerprint(root: Path) -> dict[str, str]:
    """A hash of every tensor of every split."""
    prints = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        digest = hashlib.sha256()
        for data in samples(folder):
            for key in sorted(data.keys()):
                value = data[key]
                array = value.numpy() if isinstance(value, torch.Tensor) else np.array(value)
                digest.update(key.encode() + str(array.dtype).encode() + array.tobytes())
        prints[folder.name] = digest.hexdigest()
    return prints


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("slabs") / "slabs", processes=2)


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(
    root: Path, tmp_path: Path
) -> None:
    small = {"train": 20, "val": 5, "test": 5, "test_ood": 5}
    one = make(tmp_path / "one", 1, **small)
    three = make(tmp_path / "three", 3, **small)
    other = make(tmp_path / "other", 1, seed=1, **small)
    assert fingerprint(one) == fingerprint(three)
    assert card_of(one) == card_of(three)
    assert not set(fingerprint(one).values()) & set(fingerprint(other).values())
    # A smaller data set is the beginning of a larger one (energies: other references).
    for ours, theirs in zip(samples(one / "train"), samples(root / "train"), strict=False):
        assert torch.equal(ours.pos, theirs.pos)
        assert torch.equal(ours.forces, theirs.forces)


def test_labels_equal_an_independent_emt_calculation(root: Path) -> None:
    references = {int(z): value for z, value in card_of(root)["reference_energies"].items()}
    for split in SIZES:
        for data in samples(root / split)[::3]:
            atoms = Atoms(
                data.atomic_numbers.numpy(),
                positions=data.pos.numpy().astype(float),
                cell=data.cell[0].numpy().astype(float),
                pbc=True,
                calculator=EMT(),
            )
            energy = data.energy + sum(references[z] for z in data.atomic_numbers.tolist())
            assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)
            np.testing.assert_allclose(data.forces.numpy(), atoms.get_forces(), atol=2e-6)


def test_samples_have_the_shapes_and_types_that_fairchem_reads(root: Path) -> None:
    for data in samples(root / "val"):
        n = data.natoms
        assert isinstance(n, int)
        assert isinstance(data.energy, float)
        expected = {
            "pos": ((n, 3), torch.float32),
            "forces": ((n, 3), torch.float32),
            "cell": ((1, 3, 3), torch.float32),
            "atomic_numbers": ((n,), torch.int64),
            "tags": ((n,), torch.int32),
            "fixed": ((n,), torch.int32),
            "pbc": ((1, 3), torch.bool),
        }
        for key, (shape, dtype) in expected.items():
            assert tuple(data[key].shape) == shape, key
            assert data[key].dtype == dtype, key
        assert set(data.keys()) == {*expected, "natoms", "energy", "sid", "fid"}


def test_tags_fixed_atoms_and_geometry_are_those_of_a_slab(root: Path) -> None:
    metals = dict.fromkeys(slabs.METALS, True)
    for split in SIZES:
        for data in samples(root / split):
            symbols = [chemical_symbols[z] for z in data.atomic_numbers.tolist()]
            tags = data.tags.tolist()
            assert set(tags) == {0, 1, 2}
            for symbol, tag in zip(symbols, tags, strict=True):
                assert (symbol in metals) == (tag < 2)
            assert torch.equal(data.fixed == 1, data.tags == 0)
            height = data.pos[:, 2]
            assert height[data.tags == 1].mean() > height[data.tags == 0].mean()
            assert height[data.tags == 2].max() > height[data.tags == 1].mean()
            atoms = Atoms(symbols, positions=data.pos.numpy(), cell=data.cell[0].numpy(), pbc=True)
            distances = atoms.get_all_distances(mic=True) + 10 * np.eye(len(atoms))
            radii = covalent_radii[atoms.numbers]
            assert (distances > 0.6 * (radii[:, None] + radii[None])).all()
            # No interaction through the vacuum: EMT ends before 6 Å.
            assert atoms.cell[2, 2] - np.ptp(atoms.positions[:, 2]) > 6.0
            assert data.forces[data.fixed == 0].norm(dim=1).max() > 0.1
            assert data.forces.norm(dim=1).max() <= slabs.MAX_FORCE


def test_fixed_atoms_stay_and_free_atoms_move_along_a_trajectory(root: Path) -> None:
    by_trajectory: dict[int, list[Data]] = {}
    for data in samples(root / "train"):
        by_trajectory.setdefault(data.sid, []).append(data)
    several = [frames for frames in by_trajectory.values() if len(frames) > 1]
    assert len(several) > 5
    for frames in several:
        for before, after in itertools.pairwise(frames):
            moved = (after.pos - before.pos).abs()
            assert moved[before.fixed == 1].max() == 0
            assert moved.max() >= 0.029
            assert after.fid > before.fid


def test_a_co_molecule_points_its_carbon_to_the_metal() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        slab = slabs.build_slab(rng, "fcc111", ("Cu",))
        slabs.add_adsorbate(rng, slab, "CO")
        carbon, oxygen = slab.positions[-2:]
        assert list(slab.symbols[-2:]) == ["C", "O"]
        assert carbon[2] < oxygen[2]
        assert 0.9 < np.linalg.norm(carbon - oxygen) < 1.5


def test_top_layer_alone_is_surface_on_close_packed_facets() -> None:
    for facet, layers in (("fcc111", (3, 4)), ("fcc100", (3, 4))):
        for seed in range(6):
            slab = slabs.build_slab(np.random.default_rng(seed), facet, ("Pt", "Cu"))
            levels = np.unique(slab.positions[:, 2].round(3))
            assert len(levels) in layers
            top = np.isclose(slab.positions[:, 2], levels[-1], atol=2e-3)
            assert np.array_equal(slab.get_tags() == 1, top)


def test_no_trajectory_is_in_two_splits_and_quarters_are_nested(root: Path) -> None:
    sids = {split: np.load(root / split / "metadata.npz")["sid"] for split in (*SIZES, *QUARTERS)}
    for split, size in SIZES.items():
        assert len(sids[split]) == size
        for other in SIZES:
            assert split == other or not set(sids[split]) & set(sids[other])
    whole = samples(root / "train")
    for number, quarter in enumerate(QUARTERS, 1):
        part = samples(root / quarter)
        assert number * 15 <= len(part) < number * 15 + slabs.FRAMES_PER_TRAJECTORY
        assert set(sids["train"][: len(part)]).isdisjoint(sids["train"][len(part) :])
        for ours, theirs in zip(part, whole, strict=False):
            assert (ours.sid, ours.fid, ours.energy) == (theirs.sid, theirs.fid, theirs.energy)
            assert torch.equal(ours.pos, theirs.pos)


def test_held_out_pairs_are_in_the_ood_split_alone(root: Path) -> None:
    for split in SIZES:
        fields = np.load(root / split / "metadata.npz")
        for data, adsorbate, metals in zip(
            samples(root / split), fields["adsorbate"], fields["metals"], strict=True
        ):
            numbers = data.atomic_numbers.numpy()
            present = {chemical_symbols[z] for z in numbers[data.tags.numpy() < 2]}
            assert present == set(str(metals).split("-"))
            molecule = sorted(chemical_symbols[z] for z in numbers[data.tags.numpy() == 2])
            formula = sorted(slabs.Atoms(slabs.ADSORBATES[str(adsorbate)][0]).symbols)
            assert molecule in (formula, sorted(formula * 2))
            held = {(str(adsorbate), metal) for metal in present} & slabs.HELD_OUT
            assert bool(held) == (split == "test_ood")
    # The pairs leave every adsorbate and every metal in the training set's reach.
    for adsorbate in slabs.ADSORBATES:
        assert sum(pair[0] == adsorbate for pair in slabs.HELD_OUT) in (1, 2)
    for metal in slabs.METALS:
        assert sum(pair[1] == metal for pair in slabs.HELD_OUT) <= 3


def test_card_statistics_equal_recomputed_ones(root: Path) -> None:
    card = card_of(root)
    assert card["options"] == {"recipe": "slabs", "seed": 0, **SIZES}
    for split in SIZES:
        data = samples(root / split)
        stats = card["splits"][split]
        energies = np.array([d.energy for d in data])
        forces = torch.cat([d.forces for d in data]).double()
        free = torch.cat([d.fixed for d in data]) == 0
        assert stats["frames"] == len(data)
        assert stats["trajectories"] == len({d.sid for d in data})
        assert stats["natoms"]["mean"] == pytest.approx(np.mean([d.natoms for d in data]))
        assert stats["energy"]["mean"] == pytest.approx(energies.mean(), abs=1e-9)
        assert stats["energy"]["std"] == pytest.approx(energies.std())
        assert stats["force_rms"] == pytest.approx(forces.square().mean().sqrt().item())
        assert stats["force_rms_free"] == pytest.approx(forces[free].square().mean().sqrt().item())
        assert stats["force_norm_max"]["max"] == pytest.approx(forces.norm(dim=1).max().item())
        numbers = set(torch.cat([d.atomic_numbers for d in data]).tolist())
        assert set(stats["elements"]) == {chemical_symbols[z] for z in numbers}
    train = card["splits"]["train"]
    assert card["normalizer"]["energy"] == {
        "mean": train["energy"]["mean"],
        "rmsd": train["energy"]["std"],
    }
    assert card["normalizer"]["forces"] == {"mean": 0.0, "rmsd": train["force_rms_free"]}
    for quarter in QUARTERS:
        assert card["quarters"][quarter]["frames"] == len(samples(root / quarter))


def test_references_are_the_least_squares_ones(root: Path) -> None:
    """No other references leave a smaller sum of squares: its gradient is 0 for each element."""
    data = samples(root / "train")
    elements = sorted({z for d in data for z in d.atomic_numbers.tolist()})
    counts = np.array([[d.atomic_numbers.tolist().count(z) for z in elements] for d in data])
    gradient = counts.T @ np.array([d.energy for d in data])
    np.testing.assert_allclose(gradient, 0.0, atol=5e-3)  # references are rounded to 1e-6 eV


def test_stock_dataset_sampler_and_collater_read_it(root: Path) -> None:
    dataset = create_dataset({"format": "lmdb", "src": str(root / "train")}, "train")
    assert len(dataset) == SIZES["train"]
    assert dataset.metadata_hasattr("natoms")
    sampler = BalancedBatchSampler(
        dataset, batch_size=4, num_replicas=1, rank=0, seed=0, device=torch.device("cpu")
    )
    seen = []
    for indices in sampler:
        batch = data_list_collater([dataset[i] for i in indices], otf_graph=True)
        size = len(indices)
        assert [int(n) for n in batch.natoms] == list(dataset.get_metadata("natoms", indices)[0])
        assert batch.energy.shape == (size,)
        assert batch.energy.dtype == torch.float32
        assert batch.cell.shape == (size, 3, 3)
        assert batch.pbc.shape == (size, 3)
        assert batch.pos.shape == batch.forces.shape == (int(batch.natoms.sum()), 3)
        seen += [f"{s}_{f}" for s, f in zip(batch.sid.tolist(), batch.fid.tolist(), strict=True)]
    assert len(seen) == len(set(seen)) == SIZES["train"]
    # A quarter and the whole may be open at once.
    part = create_dataset({"format": "lmdb", "src": str(root / "train_1of4")}, "train")
    assert part[0].natoms == part.get_metadata("natoms", 0)
