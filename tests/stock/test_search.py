"""What stock's neighbour search takes is known before it is done, and refused if too much."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import ase
import ase.io
import attacks
import numpy as np
import pytest
import torch
from configs import ROOT
from fairchem.core.common.utils import radius_graph_pbc
from fairchem.core.models import base
from models import batch, structures
from trainings import config, write_lmdb, write_splits, write_yaml

from fairchem_kd.analysis.subjects.structures import to_sample
from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.errors import UserError
from fairchem_kd.stock import search
from fairchem_kd.stock.samples import collate

MODEL = str(ROOT / "checkpoints" / "painn_collisions.pt")


def crowd(atoms: int, side: float) -> ase.Atoms:
    """So many atoms in a cube."""
    places = np.random.default_rng(0).uniform(0, side, (atoms, 3))
    return ase.Atoms(f"H{atoms}", places, cell=[side] * 3, pbc=True)


def sheared() -> ase.Atoms:
    return ase.Atoms("H2", [[0, 0, 0], [1, 1, 1]], cell=[[3, 0, 0], [2.5, 3, 0], [1, 2, 9]], pbc=1)


@pytest.mark.parametrize("cutoff", [3.0, 6.0, 11.9])
@pytest.mark.parametrize("names", [["slabs"], ["sheared"], ["slabs", "sheared"]])
def test_the_distances_are_counted_as_stock_has_them(
    monkeypatch: pytest.MonkeyPatch, names: list[str], cutoff: float
) -> None:
    made = {"slabs": structures(3), "sheared": [sheared()]}
    joined = collate([to_sample(atoms) for name in names for atoms in made[name]])
    seen: list[int] = []
    original = torch.logical_and

    def count(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(left.numel())
        return original(left, right)

    monkeypatch.setattr(torch, "logical_and", count)
    radius_graph_pbc(copy.copy(joined), cutoff, 50)
    cells = joined.cell.view(-1, 3, 3).numpy()
    pbc = np.ones((len(cells), 3), bool)
    assert search.distances(joined.natoms.numpy(), cells, pbc, cutoff) == seen[0]


def test_a_flat_cell_and_axes_that_are_not_periodic_have_no_images() -> None:
    flat = np.diag([3.0, 3.0, 0.0])[None]
    assert search.distances([2], flat, np.ones((1, 3)), 6.0) == 4
    cube = np.eye(3)[None] * 3
    assert search.repetitions(cube, [[True, False, True]], 6.0).tolist() == [[2, 0, 2]]


def test_what_does_not_fit_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = collate([to_sample(crowd(1008, 4.0), number) for number in range(4)])
    monkeypatch.setattr(search, "free_memory", lambda _: 10**10)
    with pytest.raises(UserError, match=r"of 4 structures, of which .*1008 atoms in 64 Å\^3.*GB"):
        search.check_batch(joined, 6.0)
    search.check_batch(batch(), 6.0)


def test_one_that_takes_long_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined = collate([to_sample(crowd(1008, 4.0))])
    monkeypatch.setattr(search, "free_memory", lambda _: 10**15)
    with caplog.at_level(logging.WARNING):
        search.check_batch(joined, 6.0)
        search.check_batch(joined, 6.0)
    assert caplog.text.count("distances") == 1


def test_stock_models_ask_once() -> None:
    search.look_before_searching()
    search.look_before_searching()
    assert base.radius_graph_pbc.__wrapped__ is radius_graph_pbc


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A file, and a set of an LMDB, of 4 structures of a thousand atoms in a few Å."""
    ase.io.write(tmp_path / "crowd.extxyz", [crowd(1008, 3.0)] * 4)
    write_splits(tmp_path / "data", val=(2, 50))
    return tmp_path


def test_models_refuse_it(crowded: Path) -> None:
    argv = ["features", MODEL, "crowd.extxyz", "--out", "f.npz", "--cpu"]
    attacks.run(argv, crowded).sentence("1008 atoms in 27 Å^3", "GB are free")
    assert not (crowded / "f.npz").exists()


def test_a_training_refuses_it_before_its_first_step(crowded: Path) -> None:
    tight = crowd(1008, 3.0)

    def squeeze(value: Any, index: int) -> Any:
        return (
            value if index != 2 else torch.tensor(np.asarray(tight.cell), dtype=torch.float)[None]
        )

    write_lmdb(crowded / "data" / "train", 6, seed=0, cell=squeeze)
    write_yaml(crowded / "run.yml", config(Path(), Path("data")))
    argv = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu"]
    said = attacks.run([*argv, "--model.cutoff=600"], crowded, fairchem)
    said.sentence("dataset.train: the neighbours within 600 Å of sample", "(sid 2", "GB are free")
