"""Ranks and runs that fill one store side by side: each structure's answer is the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from trainings import PRELOAD, assert_equal, config, count_asked, start_ranks, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.store import Reader
from fairchem_kd.teachers import filling
from fairchem_kd.teachers.place import FOLDER

pytestmark = pytest.mark.slow

SEEDS = (1, 2)


def arguments(root: Path, data: Path, teacher: Path) -> dict[str, Any]:
    block = {"teacher": {"checkpoint": str(teacher)}, "losses": {"e2n": {}, "vanilla": {}}}
    block["rattle"] = {"copies": 1, "pool": 2}
    return config(root, data, distillation=block)


def fill(_rank: int, _world: int, root: Path, data: Path, teacher: Path) -> None:
    filling.GROUP = 3
    with trainer(arguments(root, data, teacher)) as built:
        built.set_up()


def answers(root: Path) -> tuple[int, dict[bytes, dict[str, np.ndarray]]]:
    """Shards of the only store there, and all it says by structure."""
    (store,) = (root / FOLDER).iterdir()
    reader, found = Reader(store), {}
    for shard in reader.shards:
        for row, entry in enumerate(shard.entries):
            key, values = entry["key"].tobytes(), shard.values(row, shard.names)
            assert values is not None
            for name, value in found.setdefault(key, values).items():  # it may be there twice
                assert np.array_equal(value, values[name])
    return len(reader.shards), found


def test_any_number_of_ranks_keeps_the_same_bits(tmp_path: Path, data: Path, teacher: Path) -> None:
    found = {}
    for world in (1, 2, 3):
        root = tmp_path / str(world)
        root.mkdir()
        start_ranks(fill, world, root, data, teacher)
        shards, found[world] = answers(root)
        assert shards == world
    assert len(found[1]) > 15  # some copies among them
    for world in (2, 3):
        assert found[world].keys() == found[1].keys()
        for key, values in found[1].items():
            assert all(np.array_equal(v, found[world][key][n]) for n, v in values.items())


def train(index: int, root: Path, data: Path, teacher: Path, ready: Any) -> None:
    """One of two runs that share a folder and nothing else."""
    torch.set_num_threads(1)
    filling.GROUP = 3
    with trainer(
        arguments(root, data, teacher), seed=SEEDS[index], identifier=f"seed{index}"
    ) as built:
        ready.wait()
        built.train(disable_eval_tqdm=True)
        torch.save(weights(built), root / f"weights{index}")


def test_two_seeds_fill_and_share_one_store_at_once(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mp.set_forkserver_preload(PRELOAD)
    context = mp.get_context("forkserver")
    given = (tmp_path, data, teacher, context.Barrier(2))
    children = [context.Process(target=train, args=(index, *given)) for index in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    shards, found = answers(tmp_path)
    assert shards in (1, 2)
    assert len(found) > 15  # some copies among them
    asked = count_asked(monkeypatch)
    for index, seed in enumerate(SEEDS):  # again, from what both have kept: the same bits
        with trainer(arguments(tmp_path, data, teacher), seed=seed) as built:
            built.train(disable_eval_tqdm=True)
            assert_equal(
                weights(built), torch.load(tmp_path / f"weights{index}", weights_only=True)
            )
    assert sum(asked) <= 10
