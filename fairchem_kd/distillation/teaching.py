"""Filling a store ahead of any training."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.data.build import ensure_built
from fairchem_kd.distillation.answering import folders_of
from fairchem_kd.distillation.config import WHERE, TeacherConfig
from fairchem_kd.distillation.keeping import Wanted, keep
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.configs import training_config
from fairchem_kd.stock.datasets import collate
from fairchem_kd.stock.noise import quiet, without_noise
from fairchem_kd.stock.trainer import in_one_process
from fairchem_kd.teachers.filling import GROUP, Source
from fairchem_kd.teachers.live import LiveTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch


def teach_for_training(
    path: Path,
    *,
    teacher: Path | None = None,
    out: str | None = None,
    max_gb: float | None = None,
    precision: str | None = None,
    trust: bool = False,
    cpu: bool = False,
    part: tuple[int, int] | None = None,
) -> list[Path]:
    """Ask a teacher about all that the training in a config will ask it; returns the store.

    Of an ensemble that is a store of each of its members.

    Args:
        path: the config.
        teacher, out, max_gb, precision, trust: in place of the config's.
        cpu: run on the CPU even where there is a GPU.
        part: which of how many parts is done here.

    Raises:
        UserError: it is no config of a distillation, or its store cannot be filled.
    """
    given = {
        "checkpoint": None if teacher is None else str(teacher),
        "store": out,
        "max_gb": max_gb,
        "precision": precision,
        "trust_checkpoint": trust or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    with trainer_for_teaching(path, given, cpu=cpu) as trainer:
        if teacher is None and trainer.distillation_config.teacher.is_recorded:
            raise UserError(
                f"{path}: {WHERE}.teacher names stores and no checkpoint, so that there is nobody "
                "to ask: give --teacher FILE or --calculator MODULE:FACTORY."
            )
        with isolated_random_state():
            live = trainer.make_distillation()
            if live is None:
                raise UserError(f"{path}: {WHERE}.losses is empty, so that nobody is asked.")
            trainer.keep_answers(live, part)
        assert trainer.distillation is not None
        folders = folders_of(trainer.distillation.teacher)
        if not folders:
            raise UserError(f"{path}: nothing is kept, see above; mend {WHERE}.teacher.store.")
        return folders


@contextmanager
def trainer_for_teaching(
    path: Path, given: Mapping[str, Any], *, cpu: bool = False
) -> Iterator[DistillationTrainer]:
    """The trainer of a config, which trains nothing; its data sets are closed afterwards.

    Args:
        path: the config.
        given: in place of what it has under ``task.distillation.teacher``.
        cpu: run on the CPU even where there is a GPU.

    Raises:
        UserError: it is no config of a distillation.
    """
    config = training_config(path)
    ensure_built(config)
    block = (config.get("task") or {}).get("distillation")
    if not isinstance(block, dict):
        raise UserError(f"{path} has no {WHERE}, so that nobody is asked anything.")
    block["teacher"] = merged = {**(block.get("teacher") or {}), **given}
    if not any(isinstance(merged.get(key), list) for key in ("checkpoint", "store")):
        merged.pop("ensemble", None)  # one alone is asked
    config["optim"]["num_workers"] = 0
    with without_noise(), quiet():
        trainer = in_one_process(
            DistillationTrainer, config, config["dataset"], identifier="teach", cpu=cpu or None
        )
    try:
        yield trainer
    finally:
        trainer.__dict__.clear()
        del trainer
        gc.collect()  # closes the data sets


def teach_samples(
    live: LiveTeacher,
    requests: Sequence[Request],
    config: TeacherConfig,
    samples: Mapping[str, Callable[[], Iterator[Any]]],
    *,
    part: tuple[int, int] = (0, 1),
) -> Path:
    """Ask a teacher about structures; returns the store.

    Args:
        live: the teacher.
        requests: the features that are kept with its outputs.
        config: where and how much is kept.
        samples: by name, what gives the structures one after the other.
        part: which of how many parts is done here.

    Raises:
        UserError: structures that the teacher cannot be asked about, or a store that will not do.
    """
    wanted = []
    for name, read in samples.items():
        held = list(read())
        if not held:
            raise UserError(f"{name} holds no structure; name a file that does.")
        wanted.append(Wanted(held_source(name, held), float("inf")))
    stored = keep(live, requests, config, wanted, run_dir=".", device=live.device, part=part)
    if stored is None:
        raise UserError("Nothing is kept, see above; name another folder with --out.")
    return stored.folder


def held_source(name: str, samples: list[Any]) -> Source:
    """Structures in memory, as what a store is to know about."""

    def make(group: int) -> Batch:
        return collate(samples[group * GROUP : (group + 1) * GROUP])

    return Source(name, len(samples), -(-len(samples) // GROUP), make)
