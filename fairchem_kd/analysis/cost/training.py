"""What distillation adds to a step of training, and where the time goes.

The run's own trainer is set up as it was, and takes the same batches with and without distillation,
turn by turn: the ratio of the two is the overhead. Turns without a clock inside are timed for that;
other turns, in which every part waits for the device, say where the time goes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.utils import setup_imports
from tqdm import tqdm

from fairchem_kd.analysis.cost.timing import Stopwatch, Timing, clock, peak_memory, ratio
from fairchem_kd.data.build import check_dataset
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor
from fairchem_kd.models.build import load_weights, model_config
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.legacy import modern
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.datasets import close_dataset
from fairchem_kd.stock.noise import quiet
from fairchem_kd.teachers import EnsembleTeacher, LiveTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.analysis.subjects.runs import ModelFile

STATISTICS_SAMPLES = 16  # standardisation costs nothing in a step, so few will do
PLAIN, DISTILLED = "plain", "distilled"


@dataclass(frozen=True)
class TrainingCost:
    """A step of one run, with and without distillation, on the same batches."""

    data: Timing  #: reading and collating a batch, in this process
    plain: Timing  #: a step, data aside
    distilled: Timing  #: the same with distillation
    anatomy: dict[str, dict[str, Timing]]  #: ``plain`` and ``distilled`` -> part -> seconds
    peak_memory: dict[str, int]  #: bytes beyond weights, optimiser and batch
    batch_size: int
    companions: float  #: that a distilled step has beside its batch, on average
    atoms: float  #: in a batch, on average
    steps_per_epoch: int

    @property
    def overhead(self) -> Timing:
        """Distilled over plain, turn by turn: 1 where distillation costs nothing."""
        return ratio(self.distilled, self.plain)

    def epoch(self, way: str) -> float:
        """Seconds of an epoch, data included, evaluations aside."""
        step = self.plain if way == PLAIN else self.distilled
        return self.steps_per_epoch * (step.median + self.data.median)

    def as_dict(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "companions": self.companions,
            "atoms": self.atoms,
            "steps_per_epoch": self.steps_per_epoch,
            "data": self.data.as_dict(),
            PLAIN: self.plain.as_dict(),
            DISTILLED: self.distilled.as_dict(),
            "overhead": self.overhead.as_dict(),
            "epoch_seconds": {way: self.epoch(way) for way in (PLAIN, DISTILLED)},
            "peak_memory_bytes": self.peak_memory,
            "anatomy": {
                way: {part: timing.as_dict() for part, timing in parts.items()}
                for way, parts in self.anatomy.items()
            },
        }


def measure_training(
    file: ModelFile,
    *,
    cpu: bool = False,
    batch_size: int | None = None,
    repeats: int = 7,
    warm_up: int = 2,
    progress: bool = False,
) -> TrainingCost:
    """Train the run's student for some steps, in this process, and throw the result away.

    Args:
        file: the checkpoint of a distilled run; its teacher and its data have to be there.
        cpu: use the CPU even where there is CUDA.
        batch_size: in place of the run's own.
        repeats: batches, each of which is timed with and without distillation.
        warm_up: batches before them.
        progress: show a bar on a terminal.

    Raises:
        UserError: a run without distillation, or one whose teacher or data are not there.
    """
    if not file.losses:
        raise UserError(
            f"{file.path} was trained without distillation losses, so there is no cost of them; "
            "name a distilled run."
        )
    mend = "give --trust (or measure inference alone, --no-training)"
    file.check_data(file.config.get("dataset"), mend)
    block = (file.config.get("task") or {}).get("distillation") or {}
    if unlabelled := (block.get("unlabelled") or {}).get("dataset"):
        file.check_data(unlabelled, mend)
    setup_imports()
    arguments = _arguments(file, cpu, batch_size)
    check_dataset(arguments["dataset"]["train"], f"dataset.train of {file.path}")
    with quiet(), isolated_random_state():
        trainer = _Stepping(**arguments)
        try:
            contents = modern(read_checkpoint(file.path, trust=file.trust), str(file.path))
            load_weights(trainer._unwrapped_model, contents, str(file.path))
            trainer.set_up()
            return _measure(trainer, repeats, warm_up, progress)
        finally:
            trainer.close()


def _arguments(file: ModelFile, cpu: bool, batch_size: int | None) -> dict[str, Any]:
    """Those of the run's trainer, without evaluation, folders, logger and loader processes."""
    config = copy.deepcopy(dict(file.config))
    task = config.get("task") or {}
    task["distillation"] = {**task["distillation"], "statistics_samples": STATISTICS_SAMPLES}
    optim = {**config["optim"], "num_workers": 0}
    if batch_size is not None:
        optim["batch_size"] = batch_size
    return {
        "task": task,
        "model": model_config(config),
        "outputs": config["outputs"],
        "dataset": {"train": config["dataset"]},
        "optimizer": optim,
        "loss_functions": config["loss_functions"],
        "evaluation_metrics": config["evaluation_metrics"],
        "identifier": "cost",
        "local_rank": 0,
        "is_debug": True,
        "print_every": 10**9,
        "seed": (config.get("cmd") or {}).get("seed") or 0,
        "logger": "tensorboard",
        "amp": bool(config.get("amp")),
        "cpu": cpu,
    }


def _measure(trainer: _Stepping, repeats: int, warm_up: int, progress: bool) -> TrainingCost:
    batches = trainer.batches()
    data: list[float] = []
    steps: dict[str, list[float]] = {PLAIN: [], DISTILLED: []}
    parts: dict[str, list[dict[str, float]]] = {PLAIN: [], DISTILLED: []}
    memory: dict[str, int] = {}
    atoms, companions = [], []
    device = trainer.device
    bar = tqdm(range(warm_up + repeats), desc="training", disable=None if progress else True)
    for turn in bar:
        batch: list[Batch] = []
        read = clock(lambda batch=batch: batch.append(next(batches)), device)  # type: ignore[misc]
        ways = (PLAIN, DISTILLED) if turn % 2 else (DISTILLED, PLAIN)
        for way in ways:
            with trainer.going(way):
                seconds = clock(lambda b=batch[0]: trainer.one_step(b.clone()), device)  # type: ignore[misc]
                if way == DISTILLED and turn >= warm_up:
                    companions.append(trainer.structures - batch[0].natoms.numel())
                watched = trainer.watched_step(batch[0].clone())
                if turn == warm_up:
                    work = batch[0].clone()
                    memory[way] = peak_memory(lambda w=work: trainer.one_step(w), device)  # type: ignore[misc]
            if turn >= warm_up:
                steps[way].append(seconds)
                parts[way].append(watched)
        if turn >= warm_up:
            data.append(read)
            atoms.append(len(batch[0].pos))
    anatomy = {
        way: {
            part: Timing([turn.get(part, 0.0) for turn in turns])
            for part in dict.fromkeys(part for turn in turns for part in turn)
        }
        for way, turns in parts.items()
    }
    return TrainingCost(
        Timing(data),
        Timing(steps[PLAIN]),
        Timing(steps[DISTILLED]),
        anatomy,
        memory,
        trainer.config["optim"].get("batch_size", 1),
        sum(companions) / len(companions),
        sum(atoms) / len(atoms),
        len(trainer.train_loader),
    )


class _Stepping(DistillationTrainer):
    """The run's trainer, one step at a time, as its ``train`` takes them."""

    structures = 0  #: in the last step, companions among them
    _distilled_steps = 0

    def close(self) -> None:
        """Close the data, so that they can be opened again."""
        close_dataset(self.train_dataset.dataset)
        if self.companions is not None and self.companions.unlabelled is not None:
            whole: Any = self.companions.unlabelled.dataset.dataset  # fairchem's subset of it all
            close_dataset(whole.dataset)

    def batches(self) -> Iterator[Batch]:
        """The training batches, over and over."""
        epoch = 0
        while True:
            self.train_sampler.set_epoch_and_start_iteration(epoch, 0)
            yield from self.train_loader
            epoch += 1

    @contextmanager
    def going(self, way: str) -> Iterator[None]:
        """Within the block, train plainly or with distillation."""
        kept = self.distiller, self.companions
        if way == PLAIN:
            self.distiller = self.companions = None
        try:
            yield
        finally:
            self.distiller, self.companions = kept

    def one_step(self, batch: Batch) -> None:
        """What stock's loop does with a batch; ``batch`` is used up."""
        self._step_within(batch, None)

    def watched_step(self, batch: Batch) -> dict[str, float]:
        """The same, and the seconds of its parts."""
        watch = Stopwatch(self.device)
        with self._watching(watch):
            self._step_within(batch, watch)
        return watch.seconds

    def _step_within(self, batch: Batch, watch: Stopwatch | None) -> None:
        def part(label: str) -> Any:
            return ExitStack() if watch is None else watch.section(label)

        if self.distillation is not None:
            # of their own, since unlabelled structures are dealt out step after step
            self._distilled_steps += 1
        self.step = max(1, self._distilled_steps)
        self.model.train()
        with torch.autocast("cuda", enabled=self.scaler is not None):
            with part("student forward"):
                out = self._forward(batch)
            watched = None if self.distiller is None else self.distiller.watched
            self.structures = (batch if watched is None else watched.batch).natoms.numel()
            with part("label losses"):
                loss = self._compute_loss(out, batch)
        with part("metrics"):
            metrics = self._compute_metrics(out, batch, self.evaluator, {})
            self.evaluator.update("loss", loss.item(), metrics)
        loss = self.scaler.scale(loss) if self.scaler else loss
        with part("backward"):
            self._backward(loss)

    @contextmanager
    def _watching(self, watch: Stopwatch) -> Iterator[None]:
        """Within the block, the inner parts of a step are sections of ``watch``."""
        wanted: list[tuple[Any, str, str]] = [
            (self.optimizer, "zero_grad", "optimiser"),
            (self.optimizer, "step", "optimiser"),
        ]
        if self.ema is not None:
            wanted.append((self.ema, "update", "EMA"))
        if self.companions is not None:
            wanted.append((self.companions, "joined", "companions"))
        taps: dict[str, FeatureExtractor] = {}
        if self.distillation is not None:
            teacher = self.distillation.teacher
            given = teacher.given if isinstance(teacher, EnsembleTeacher) else [teacher]
            lives = [one for one in given if isinstance(one, LiveTeacher)]
            lead = given[teacher.lead if isinstance(teacher, EnsembleTeacher) else 0]
            taps = {"student taps": self.distillation.student_tap}
            if isinstance(lead, LiveTeacher):
                taps["teacher taps"] = lead.extractor(self.distillation.teacher_requests)
            wanted += [
                *((one.frozen, "forward", "teacher forward") for one in lives),
                (self.distillation, "loss", "units and sums of the terms"),
                (self.projections, "step", "projections' optimiser"),
                (self.projections, "zero_grad", "projections' optimiser"),
            ]
            wanted += [
                (term, "forward", f"loss {name}") for name, term in self.distillation.terms.items()
            ]
        with ExitStack() as stack:
            for owner, name, label in wanted:
                stack.enter_context(
                    _replaced(owner, name, watch.timed(label, getattr(owner, name)))
                )
            for label, tap in taps.items():
                around = partial(watch.section, label)
                stack.enter_context(_replaced(tap, "around", around))
            yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within the block, and what it was after it."""
    was_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
