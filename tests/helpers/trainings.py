"""Small trainings: a labelled LMDB, a teacher's checkpoint, stock and distilling trainers.

`data` and `teacher` are fixtures for the modules that import them.
"""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from ase import Atoms
from fairchem.core.common.utils import setup_imports
from fairchem.core.trainers import OCPTrainer
from models import fit_scales, model_config, structures, to_data

from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.teachers import LiveTeacher

#: What a process has imported from which those of tests are forked: it takes seconds.
PRELOAD = ["fairchem_kd.launch.run", "fairchem_kd.distillation.trainer"]
NORMALIZER = {"energy": {"mean": 10.0, "rmsd": 2.0}, "forces": {"mean": 0.0, "rmsd": 1.5}}
FEATURE_LOSSES: dict[str, Any] = {"n2n": {}, "e2n": {}, "v2v": {}}
ALL_LOSSES = {**FEATURE_LOSSES, "vanilla": {}, "per_atom_energy": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 structures to train with, 4 steps of 3 an epoch, and 4 to validate with."""
    return write_splits(tmp_path_factory.mktemp("data"), train=(11, 0), val=(4, 50))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The checkpoint of a small GemNet-OC."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), data)


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many structures live teachers will be asked, call by call."""
    asked: list[int] = []
    teach = LiveTeacher.teach

    def counting(self: LiveTeacher, batch: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(batch.natoms))
        return teach(self, batch, *args, **more)

    monkeypatch.setattr(LiveTeacher, "teach", counting)
    return asked


def write_lmdb(
    folder: Path,
    count: int,
    seed: int,
    *,
    more: Callable[[Atoms], dict[str, Any]] | None = None,
    **edit: Any,
) -> Path:
    """``count`` rattled slabs of unequal size with EMT labels.

    ``more`` gives further labels, and ``edit`` spoils values by key.
    """
    folder.mkdir(parents=True)
    samples = []
    for index in range(count):
        atoms = structures(4, seed=seed + index // 4, std=0.15)[index % 4]
        data = to_data(atoms, index)
        data.energy = float(data.energy)
        data.pbc = torch.ones(1, 3, dtype=torch.bool)
        for key, value in (more(atoms) if more is not None else {}).items():
            data[key] = value
        for key, change in edit.items():
            data[key] = change(data[key], index)
        samples.append(data)
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, lock=False, map_size=2**24)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(samples):
            transaction.put(str(index).encode(), pickle.dumps(data, protocol=4))
        transaction.put(b"length", pickle.dumps(count, protocol=4))
    env.close()
    np.savez(folder / "metadata.npz", natoms=[data.natoms for data in samples])
    return folder


def config(
    root: Path,
    data: Path,
    *,
    model: str = "painn",
    losses: dict[str, Any] | None = None,
    teacher: Path | None = None,
    distillation: dict[str, Any] | None = None,
    **optim: Any,
) -> dict[str, Any]:
    """The arguments of a trainer: 2 epochs of 4 steps on CPU, evaluated every 3 steps."""
    task: dict[str, Any] = {}
    if losses is not None or distillation is not None:
        task["distillation"] = {
            "teacher": {"checkpoint": str(teacher) if teacher else None},
            "losses": losses,
            "statistics_samples": 8,
            **(distillation or {}),
        }
    return {
        "task": task,
        "model": model_config(model),
        "outputs": {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        },
        "dataset": {
            "train": {
                "format": "lmdb",
                "src": str(data / "train"),
                "transforms": {"normalizer": copy.deepcopy(NORMALIZER)},
            },
            "val": {"format": "lmdb", "src": str(data / "val")},
        },
        "optimizer": {
            "batch_size": 3,
            "eval_batch_size": 4,
            "num_workers": 0,
            "max_epochs": 2,
            "eval_every": 3,
            "lr_initial": 2e-3,
            "optimizer": "AdamW",
            "optimizer_params": {"amsgrad": True},
            "scheduler": "CosineAnnealingLR",
            "T_max": 8,
            "ema_decay": 0.9,
            "clip_grad_norm": 10.0,
            **optim,
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 10}},
        ],
        "evaluation_metrics": {
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
            "primary_metric": "forces_mae",
        },
        "identifier": "test",
        "run_dir": str(root),
        "local_rank": 0,
        "print_every": 1,
        "seed": 3,
        "logger": "tensorboard",
        "cpu": True,
    }


@contextmanager
def trainer(
    arguments: dict[str, Any], cls: type[OCPTrainer] = DistillationTrainer, **more: Any
) -> Iterator[Any]:
    """A trainer; its datasets are closed afterwards, since LMDB opens a file once in a process."""
    setup_imports()
    logging.disable(logging.INFO)
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    built = None
    try:
        built = cls(**copy.deepcopy({**arguments, **more}))
        yield built
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
        torch.set_flush_denormal(False)
        logging.disable(logging.NOTSET)
        if built is not None:
            if built.logger is not None:
                built.logger.writer.close()
            built.__dict__.clear()
        gc.collect()


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Within the block, relative paths start from ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_splits(root: Path, **splits: tuple[int, int]) -> Path:
    """Data sets by name, each of so many structures from a seed; returns ``root``."""
    for name, (count, seed) in splits.items():
        write_lmdb(root / name, count, seed)
    return root


def write_home(sizes: dict[str, int], *, model: str = "gemnet_oc", **edit: Any) -> None:
    """In the current folder: data/SPLIT for each of ``sizes``, and an untrained teacher.pt."""
    for number, (split, count) in enumerate(sizes.items()):
        write_lmdb(Path("data") / split, count, seed=20 * number, **edit)
    write_teacher(Path("teacher"), Path("data"), model).rename("teacher.pt")


def write_sweep_base(folder: Path, epochs: int) -> None:
    """base.yml: a student with small data and a small teacher, saved every other step."""
    write_lmdb(folder / "data/train", 6, seed=0)
    write_lmdb(folder / "data/val", 2, seed=50)
    teacher = write_teacher(folder, folder / "data", "painn")
    arguments = config(
        folder,
        folder / "data",
        losses={"n2n": {}},
        teacher=teacher,
        max_epochs=epochs,
        eval_every=10,
        checkpoint_every=2,
    )
    write_yaml(folder / "base.yml", arguments)


def write_teacher(root: Path, data: Path, model: str = "gemnet_oc", seed: int = 7) -> Path:
    """A stock trainer's checkpoint of a small teacher with normalisers of its own."""
    arguments = config(root, data, model=model)
    arguments["dataset"]["train"]["transforms"]["normalizer"] = {
        "energy": {"mean": 8.0, "rmsd": 3.0},
        "forces": {"mean": 0.0, "rmsd": 2.0},
    }
    with trainer(arguments, OCPTrainer, seed=seed, identifier="teacher") as built:
        fit_scales(built.model)
        path = built.save(checkpoint_file="teacher.pt", training_state=False)
    return Path(path)


def trained(arguments: dict[str, Any], cls: type[OCPTrainer] = DistillationTrainer) -> dict:
    """The weights at the end of a training."""
    with trainer(arguments, cls) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


def interrupted(arguments: dict[str, Any], step: int) -> str:
    """Train until the checkpoint of a step is written, and stop; the run's ``timestamp_id``."""
    with trainer(arguments) as built:
        save = built.save

        def once(*args: Any, **kwargs: Any) -> Any:
            path = save(*args, **kwargs)
            if built.step == step:
                raise KeyboardInterrupt
            return path

        built.save = once
        with pytest.raises(KeyboardInterrupt):
            built.train(disable_eval_tqdm=True)
        return built.timestamp_id


def weights(built: OCPTrainer) -> dict[str, torch.Tensor]:
    """A copy of the student's weights."""
    return {name: value.clone() for name, value in built._unwrapped_model.state_dict().items()}


def start_ranks(function: Callable[..., None], world: int, root: Path, *more: Any) -> None:
    """Run ``function(rank, world, root, ...)`` in one process per rank, joined by gloo."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    store = tempfile.mktemp(prefix="store", dir=root)
    arguments = (function, world, store, root, *more)
    mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")


def _rank(rank: int, function: Callable[..., None], world: int, store: str, *more: Any) -> None:
    gc.freeze()  # imports, of which no collection of garbage finds any
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(rank, world, *more)
    dist.destroy_process_group()


def assert_same(left: Any, right: Any, where: str) -> None:
    """Equal through and through, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert left == right, where


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names and the same bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def write_yaml(
    path: Path, arguments: dict[str, Any], cls: str = "fairchem_kd.DistillationTrainer"
) -> Path:
    """The same run as a config file for the ``fairchem`` command."""
    keys = ("task", "model", "outputs", "dataset", "loss_functions", "evaluation_metrics", "logger")
    contents = {"trainer": cls, "optim": arguments["optimizer"]}
    contents |= {key: arguments[key] for key in keys}
    path.write_text(yaml.safe_dump(contents))
    return path
