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
from fairchem_kd.distillation.keeping import asked_ahead
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.stock.noise import without_noise
from fairchem_kd.stock.trainer import in_one_process
from fairchem_kd.teachers.place import OFF


@dataclass(frozen=True)
class DryRun:
    """What a few steps on one batch showed."""

    systems: int
    atoms: int
    loss: float
    terms: dict[str, float]  #: raw and weighted value of each term
    seconds: float  #: of a step, the teacher asked in it
    asking: float  #: of which the teacher takes
    asked: int  #: structures of a step that it is asked about
    plain_seconds: float  #: of one without
    memory: int  #: bytes, at most: of the GPU, or of the process
    steps: int  #: of the whole training
    ahead: int  #: structures of which the teacher is asked once, before the first step
    from_store: float  #: share of the teacher's answers that comes of these
    device: str
    agreement: Agreement | None  #: of the teacher with the student's labels, as they are
    zero: bool  #: the teacher's energies had to be shifted to the labels' zero, and were

    @property
    def seconds_ahead(self) -> float:
        """Of asking ahead of the first step."""
        return self.ahead * self.asking / max(self.asked, 1)

    @property
    def seconds_of_step(self) -> float:
        """Of a step, with the answers that the store then has read from it."""
        return self.seconds - self.from_store * self.asking


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
    asking, asked = _asking(trainer, batch, repeats)
    ahead, from_store = _kept(trainer)
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
        asking=min(asking, seconds),
        asked=asked,
        plain_seconds=plain,
        memory=memory,
        steps=trainer.last_step,
        ahead=ahead,
        from_store=from_store,
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


def _asking(trainer: DistillationTrainer, batch: Any, repeats: int) -> tuple[float, int]:
    """The median time of asking the teacher about all structures of a step, and their number."""
    distillation = trainer.distillation
    if distillation is None:
        return 0.0, 0
    whole = batch.clone()
    if trainer.companions is not None:
        whole = trainer.companions.joined(whole, trainer.step)
    whole = whole.to(trainer.device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        distillation.teacher.teach(whole, distillation.teacher_requests)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds), int(whole.natoms.numel())


def _kept(trainer: DistillationTrainer) -> tuple[int, float]:
    """Structures of which a training asks ahead, and the share of its answers that they are."""
    config = trainer.distillation_config.teacher
    if trainer.distillation is None or config.is_recorded or config.store == OFF:
        return 0, 0.0
    wanted = trainer.wanted()
    ahead = asked_ahead(wanted)
    share = sum(one.draws for one in ahead) / max(sum(one.draws for one in wanted), 1.0)
    return sum(one.source.structures for one in ahead), share


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
