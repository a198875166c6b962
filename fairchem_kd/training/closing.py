"""What a training tells at its end: where the student is, how good, what it cost, what comes next.

The student's best weights, and the teacher where there is one, are tried on the same structures:
some of the validation set and of the test set, evenly spread. `fairchem-kd compare` takes all of
them, and seeds and intervals; this is a first look.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.modules.evaluator import Evaluator
from fairchem.core.trainers import OCPTrainer
from torch import Tensor

from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.legacy import without_wrappers
from fairchem_kd.text import digits
from fairchem_kd.training.progress import in_words

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.training.restartable import Predict, RestartableTrainer

MOST = 128  #: structures of a set that are looked at
_UNITS = {"energy": ("meV", 1e3), "forces": ("meV/Å", 1e3)}


@dataclass(frozen=True)
class Judged:
    """Mean absolute errors on some structures of a set, by target, in the labels' units."""

    split: str
    structures: int
    student: dict[str, float]
    teacher: dict[str, float] | None

    def __str__(self) -> str:
        told = ", ".join(f"{name} {_shown(name, value)}" for name, value in self.student.items())
        if self.teacher:
            theirs = ", ".join(_shown(name, value) for name, value in self.teacher.items())
            told += f"; the teacher's {theirs} ({self.times()} times those)"
        return f"{self.split} (MAE of {self.structures} structures): {told}"

    def times(self) -> str:
        """The student's errors over the teacher's."""
        assert self.teacher is not None
        pairs = [(self.student[name], value) for name, value in self.teacher.items()]
        return " and ".join(f"{own / other:.2g}" if other else "inf" for own, other in pairs)

    @property
    def teacher_is_no_better(self) -> bool:
        """Whether the student is as good as its teacher on every target of both."""
        theirs = self.teacher or {}
        return bool(theirs) and all(self.student[name] <= value for name, value in theirs.items())


def tell_end(trainer: RestartableTrainer) -> None:
    """Say what came out; on the first rank, after the training and outside of it."""
    if trainer.records is None:
        return
    try:
        lines = closing_lines(trainer, trainer.records.seconds)
    except Exception as error:  # the student is there, whatever becomes of a look at it
        lines = [f"The training has ended; its errors could not be measured here ({error})."]
    for line in lines:
        logging.info(line)


def closing_lines(trainer: RestartableTrainer, seconds: float) -> list[str]:
    """Six lines at most, for the first rank of a training that has ended."""
    folder = Path(trainer.config["cmd"]["checkpoint_dir"])
    best, last = folder / "best_checkpoint.pt", folder / "checkpoint.pt"
    found = next((path for path in (best, last) if path.is_file()), None)
    left = f"The student is {_relative(found)}" if found else "They have left no checkpoint"
    lines = [f"Done: {trainer.step} steps. {left}"]
    judged = judge(trainer, best if best.is_file() else None)
    lines += [str(one) for one in judged]
    if judged and judged[0].teacher_is_no_better:
        logging.warning(
            "The teacher is no better than its student on the validation set, so that there is "
            "little left to learn from it here: a better teacher, or structures that have no "
            "labels, would give it something to teach."
        )
    lines.append(f"It took {in_words(seconds)}{trainer.cost_in_words()}.")
    if found is not None:
        run, student = shlex.quote(_relative(folder)), shlex.quote(_relative(found))
        pair = f"{run} OTHER_RUN" if trainer.teacher_prediction is None else f"PLAIN_RUN {run}"
        lines.append(f"Compare it: fairchem-kd compare {pair}")
        lines.append(f"Hand it on: fairchem-kd export {student} student.pt")
    return lines


def judge(trainer: RestartableTrainer, best: Path | None) -> list[Judged]:
    """The errors of the student with its best weights, and of its teacher, by split.

    Sets without labels are left out.
    """
    loaders = {"val": trainer.val_loader, "test": trainer.test_loader}
    judged = []
    with _with_weights(trainer, best), torch.no_grad():
        for split, loader in loaders.items():
            if loader is None or not len(loader.dataset):
                continue
            dataset = loader.dataset
            if any(dataset[0].get(name) is None for name in trainer.output_targets):
                continue
            number = min(MOST, len(dataset))
            chosen = [i * len(dataset) // number for i in range(number)]
            size = int(trainer.config["optim"].get("eval_batch_size") or 16)
            batches = [chosen[at : at + size] for at in range(0, number, size)]
            student = _errors(trainer, _prediction_of(trainer), dataset, batches)
            teacher = None
            if trainer.teacher_prediction is not None:
                teacher = _errors(trainer, trainer.teacher_prediction, dataset, batches) or None
            judged.append(Judged(split, number, student, teacher))
    return judged


def _errors(
    trainer: RestartableTrainer, predict: Predict, dataset: Any, batches: list[list[int]]
) -> dict[str, float]:
    """By target, as stock's evaluator has them: of free atoms alone where the config says so."""
    targets, metrics = trainer.output_targets, None
    evaluator = Evaluator(eval_metrics={name: ["mae"] for name in targets})
    said: set[str] = set()
    for numbers in batches:
        batch = trainer.collater([dataset[i] for i in numbers]).to(trainer.device)
        out = predict(batch)
        said = said | out.keys() if metrics is None else said & out.keys()
        nothing = {
            name: torch.zeros_like(batch[name]).view(_rows(batch, target), -1)
            for name, target in targets.items()
            if name not in out
        }
        metrics = OCPTrainer._compute_metrics(trainer, out | nothing, batch, evaluator, metrics)
    found = metrics or {}
    return {n: float(found[f"{n}_mae"]["metric"]) for n in targets if n in said}


def _rows(batch: Batch, target: Mapping[str, Any]) -> int:
    return len(batch.pos) if target["level"] == "atom" else len(batch.natoms)


def _prediction_of(trainer: RestartableTrainer) -> Predict:
    """The student's outputs without DDP around it: the other ranks may have gone."""

    def predict(batch: Batch) -> dict[str, Tensor]:
        wrapped, trainer.model = trainer.model, trainer._unwrapped_model
        try:
            return OCPTrainer._forward(trainer, batch)
        finally:
            trainer.model = wrapped

    return predict


@contextmanager
def _with_weights(trainer: RestartableTrainer, best: Path | None) -> Iterator[None]:
    """Within the block the student has these weights, and is evaluated."""
    model = trainer._unwrapped_model
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    training = model.training
    model.eval()
    try:
        if best is not None:
            saved = read_checkpoint(best, own=True)
            model.load_state_dict(without_wrappers(saved["state_dict"]))
        yield
    finally:
        model.load_state_dict(kept)
        model.train(training)


def _shown(name: str, value: float) -> str:
    unit, factor = _UNITS.get(name, ("", 1.0))
    return f"{digits(factor * value)} {unit}".rstrip()


def _relative(path: Path) -> str:
    """As a user in this folder would write it."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
