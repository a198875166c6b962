"""A few steps of a training before it is started: does it run, how long, how much memory."""

from __future__ import annotations

import copy
import gc
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fairchem_kd.distillation.agreement import Agreement
from fairchem_kd.distillation.fitting import look_at_labels
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.stock.noise import without_noise
from fairchem_kd.stock.trainer import in_one_process


@dataclass(frozen=True)
class DryRun:
    """What a few steps on one batch showed."""

    systems: int
    atoms: int
    loss: float
    terms: dict[str, float]  #: raw and weighted value of each term
    seconds: float  #: of a step with the teacher
    plain_seconds: float  #: of one without
    memory: int  #: bytes, at most: of the GPU, or of the process
    steps: int  #: of the whole training
    device: str
    agreement: Agreement | None  #: of the teacher with the student's labels, as they are
    zero: bool  #: the teacher's energies had to be shifted to the labels' zero, and were


def dry_run(config: Mapping[str, Any], where: Path, repeats: int = 3) -> DryRun:
    """Train for a few steps on one batch, with the teacher and without; nothing is written.

    Args:
        config: a complete training config with ``task.distillation``.
        where: its file, for errors.
        repeats: timed steps of each kind, after one that is not timed.

    Raises:
        UserError: it cannot be trained, or the loss is not finite.
    """
    with without_noise():
        try:
            return _measure(config, where, repeats)
        finally:
            gc.collect()  # closes the data set: LMDB opens a file once in a process


def _measure(config: Mapping[str, Any], where: Path, repeats: int) -> DryRun:
    trainer = _trainer(config, where)
    assert trainer.train_loader is not None
    trainer.check_labels()
    trainer.set_up()
    found, zero = look_at_labels(trainer.distillation, trainer.train_samples, trainer.collater)
    trainer.step = 1  # the first of a training, by which unlabelled structures are dealt
    batch = next(iter(trainer.train_loader), None)
    if batch is None:
        raise UserError(f"{where}: dataset.train gives no batch; it is empty.")
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        loss, seconds = _steps(trainer, batch, repeats)
    except UserError:
        raise
    except Exception as error:  # of a model, or of an output that is not there
        raise UserError(
            f"{where}: a training step fails ({type(error).__name__}: {error}); see that plain "
            "training with this config starts, and that the teacher takes such structures."
        ) from error
    distillation = trainer.distillation
    terms = distillation.values.read() if distillation is not None else {}
    memory = _memory(trainer.device)
    trainer.distiller = None
    _, plain = _steps(trainer, batch, repeats)
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: the loss of the first batch is {loss} ({terms}); check the data and the "
            "normaliser."
        )
    return DryRun(
        systems=int(batch.natoms.numel()),
        atoms=int(batch.natoms.sum()),
        loss=loss,
        terms=terms,
        seconds=seconds,
        plain_seconds=plain,
        memory=memory,
        steps=trainer.last_step,
        device=trainer.device.type,
        agreement=found,
        zero=zero,
    )


def _trainer(config: Mapping[str, Any], where: Path) -> DistillationTrainer:
    config = copy.deepcopy(dict(config))
    config["task"]["distillation"]["statistics_samples"] = config["optim"].get("batch_size", 1)
    config["optim"]["num_workers"] = 0
    try:
        data = {"train": config["dataset"]["train"]}
        return in_one_process(DistillationTrainer, config, data, identifier="init", seed=0)
    except UserError:
        raise
    except Exception as error:  # whatever fairchem makes of a config that it cannot train
        raise UserError(
            f"{where}: fairchem cannot train with it ({type(error).__name__}: {error}); mend the "
            "config until plain training starts."
        ) from error


def _steps(trainer: DistillationTrainer, batch: Any, repeats: int) -> tuple[float, float]:
    """Loss of the first step, and the median time of those after it in seconds."""
    losses, seconds = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        losses.append(trainer.take_step(batch.clone()))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return losses[0], median(seconds[1:])


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
