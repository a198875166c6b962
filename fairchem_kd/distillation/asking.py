"""Filling a store by asking an ASE calculator: about data sets, or all that a training will ask.

The calculator is asked by :mod:`fairchem_kd.calculators`, structure by structure; here it is worked
out about which, whether it fits the training, and how its answers compare with labels.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairchem_kd.calculators.asking import Calculator, NoAnswer
from fairchem_kd.calculators.filling import CalculatorFilling, Item, prepare
from fairchem_kd.calculators.structures_file import write_structures
from fairchem_kd.distillation.agreement import Agreement, agreement, evenly
from fairchem_kd.distillation.relying import refuse_new_copies
from fairchem_kd.distillation.teaching import held_source, trainer_for_teaching
from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.distillation.zero import fit_zero
from fairchem_kd.errors import UserError
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.datasets import collate
from fairchem_kd.store import Card
from fairchem_kd.teachers import filling
from fairchem_kd.teachers.answers import fits, structures_of
from fairchem_kd.teachers.drift import Difference, difference, refuse_drift, usual
from fairchem_kd.teachers.filling import Source
from fairchem_kd.teachers.place import size_of
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import StoredTeacher

if TYPE_CHECKING:
    from fairchem_kd.store import Column

Say = Callable[[str], Any]

_LABELLED = 8  # structures whose labels tell whether the forces are in the same units
_ALIKE = 0.8  # correlation of forces from which their ratio says something
_RATIO = (1 / 3, 3.0)
_FACTORS = {
    23.061: "kcal/mol/Å",
    96.485: "kJ/mol/Å",
    1 / 51.422: "Hartree/Bohr",
    1 / 27.211: "Hartree/Å",
    1 / 25.711: "Rydberg/Bohr",
}


class Asking:
    """How a store is filled.

    Args:
        out: the store's folder.
        calculator: is asked.
        part: which of how many parts is done here; None for all of it, with what is told at the
            end.
        max_gb: GB that the store may have.
        retry: ask again about structures of which nothing could be said.
        say: takes what is found, line by line.
    """

    def __init__(
        self,
        out: Path,
        calculator: Calculator,
        *,
        part: tuple[int, int] | None = None,
        max_gb: float = 20.0,
        retry: bool = False,
        say: Say = logging.info,
    ) -> None:
        self.out = out
        self.calculator = calculator
        self.part = part
        self.max_gb = max_gb
        self.retry = retry
        self.say = say if part is None else lambda _: None

    def prepare(self, sources: Sequence[Source], labelled: Any) -> None:
        """Make the store, after looking at the calculator's forces.

        Args:
            sources: what will be asked about.
            labelled: samples, some of which may have forces.

        Raises:
            UserError: it is another teacher's, or the calculator will not do.
        """
        new = Card.read(self.out, "--out") is None
        if new:
            check_units(self.calculator, labelled)
        _, told = prepare(self.out, self.calculator, items_of(sources))
        for line in told:
            self.say(line)

    def fill(self, sources: Sequence[Source]) -> bool:
        """Ask about what is missing; whether all of this part was asked about.

        Raises:
            UserError: the calculator can say nothing of many structures in a row.
        """
        number, parts = self.part or (0, 1)
        asking = CalculatorFilling(
            self.out,
            self.calculator,
            limit=self.max_gb * 1e9 - size_of(self.out),
            retry=self.retry,
            quiet=number > 0,
        )
        total = -(-sum(source.structures for source in sources) // parts)
        summary = asking.fill(items_of(sources, number, parts), total)
        self.say(f"{self.out}: {summary}")
        return not summary.ended


def items_of(sources: Sequence[Source], part: int = 0, parts: int = 1) -> Iterator[Item]:
    """The structures of sources: of each every ``parts``-th group from ``part`` on."""
    for source in sources:
        for group in range(part, source.groups, parts):
            batch = source.make(group)
            if batch is None:
                continue
            for place, structure in enumerate(structures_of(batch)):
                yield Item(source.name, group * filling.GROUP + place, structure)


def ask_for_training(path: Path, asking: Asking) -> None:
    """Ask about all that the training in a config will ask of its teacher.

    Args:
        path: the config.
        asking: where and how.

    Raises:
        UserError: it is no config of a distillation, the calculator does not give what its losses
            compare, or the store will not do.
    """
    with trainer_for_teaching(path, {"store": str(asking.out)}) as trainer:
        sources = _sources(trainer, path)
        asking.prepare(sources, trainer.train_samples)
        with isolated_random_state():
            teacher = trainer.make_distillation()  # refuses losses that the store cannot serve
        assert isinstance(teacher, RecordedTeacher)
        whole = asking.fill(sources)
        if asking.part is None and whole:
            trainer.keep_answers(teacher)
            _tell_labels(trainer, asking.say)


def write_wanted(path: Path, file: Path) -> int:
    """Write the structures about which the training in a config will ask; returns how many.

    Raises:
        UserError: it is no config of a distillation.
    """
    with trainer_for_teaching(path, {"store": "written-later"}) as trainer:
        return write_structures(file, items_of(_sources(trainer, path)))


def ask_for_samples(samples: Mapping[str, list[Any]], asking: Asking) -> None:
    """Ask about structures.

    Args:
        samples: by name, as fairchem's collater takes them.
        asking: where and how.

    Raises:
        UserError: the store or the calculator will not do.
    """
    sources = [held_source(name, held) for name, held in samples.items()]
    every = [sample for held in samples.values() for sample in held]
    asking.prepare(sources, every)
    asking.fill(sources)
    labelled = [one for one in every if getattr(one, "energy", None) is not None]
    if asking.part is not None or not labelled:
        return
    teacher = RecordedTeacher(asking.out)
    stored = StoredTeacher(teacher, asking.out, (), teacher.columns(()))
    kept = [one for one in labelled if _is_there(stored, one)]
    if kept:
        found = agreement(stored, (), kept, collate, torch.device("cpu"))
        _tell(found, asking.say, lambda: fit_zero(stored, (), kept, collate, torch.device("cpu")))


def write_samples(samples: Mapping[str, list[Any]], file: Path) -> int:
    """Write structures for another environment; returns how many.

    Raises:
        OSError: the file cannot be written.
    """
    return write_structures(file, items_of([held_source(*one) for one in samples.items()]))


def _is_there(stored: StoredTeacher, sample: Any) -> bool:
    (structure,) = structures_of(collate([sample]))
    return stored.reader.has(structure.key(), stored.names)


def _sources(trainer: DistillationTrainer, path: Path) -> list[Source]:
    if not trainer.distillation_config.active_terms:
        raise UserError(f"{path}: task.distillation.losses is empty, so that nobody is asked.")
    with isolated_random_state():
        trainer.companions = trainer.make_companions(lambda numbers: None)
    refuse_new_copies(trainer.companions)
    return [want.source for want in trainer.wanted()]


def _tell_labels(trainer: DistillationTrainer, say: Say) -> None:
    distillation = trainer.distillation
    assert distillation is not None
    found = distillation.agreement(trainer.train_samples, trainer.collater)
    _tell(
        found,
        say,
        lambda: distillation.fit_zero(trainer.train_samples, trainer.collater),
    )


def _tell(found: Agreement | None, say: Say, fit: Callable[[], Any]) -> None:
    """How a teacher compares with labels, and by how much the zeros of their energies differ."""
    if found is None:
        return
    say(f"The teacher on the labels: {found}")
    if not found.other_zero:
        return
    say(f"The zeros of its energies and of the labels differ: {found.zeros}.")
    try:
        fit()  # tells the shift of each element
    except UserError as why:
        say(str(why))
        return
    say("A training takes these shifts with task.distillation.teacher.energy_zero: labels.")


def check_units(calculator: Calculator, dataset: Any) -> None:
    """Refuse forces that are those of the labels, in other units or with another sign.

    Args:
        calculator: is asked about a few structures.
        dataset: samples; those without forces are passed over.

    Raises:
        UserError: naming the factor.
    """
    labels, said = [], []
    for index in evenly(len(dataset), _LABELLED):
        forces = getattr(dataset[index], "forces", None)
        if forces is None:
            continue
        (structure,) = structures_of(collate([dataset[index]]))
        try:
            _, theirs = calculator.raw(structure)
        except NoAnswer:
            continue
        labels.append(np.asarray(forces, np.float64).ravel())
        said.append(theirs.ravel())
    if not labels:
        return
    ours, theirs = np.concatenate(labels), np.concatenate(said)
    square, product = float(ours @ ours), float(ours @ theirs)
    norm = np.sqrt(square * float(theirs @ theirs))
    if not norm or abs(product) < _ALIKE * norm:
        return
    ratio = product / square
    least, most = _RATIO
    if least <= ratio <= most:
        return
    near = min(_FACTORS, key=lambda factor: abs(np.log(abs(ratio) / factor)))
    words = f", as in {_FACTORS[near]}" if abs(np.log(abs(ratio) / near)) < np.log(1.5) else ""
    raise UserError(
        f"--calculator {calculator.factory.path}: its forces are {ratio:.3g} times the labels'"
        f"{words}: energies must be in eV and forces in eV/Å, minus the gradient."
    )


def verify_calculator(store: Path, card: Card, calculator: Calculator, samples: int) -> list[str]:
    """Ask a calculator again about entries of its store that are drawn; lines of what was found.

    Raises:
        UserError: it says something else now.
    """
    if card.teacher != calculator.factory.digest:
        raise UserError(
            f"{store} keeps what {card.name} said with {(card.calculator or {}).get('versions')}, "
            f"and here it has {calculator.factory.versions}, or other arguments: install what it "
            "was, or fill another store."
        )
    teacher = RecordedTeacher(store)
    columns = teacher.columns(sorted(teacher.features))
    stored = StoredTeacher(teacher, store, (), columns)
    worst: dict[str, Difference] = {}
    asked = 0
    for name, structure, kept in _drawn(stored, columns, samples):
        try:
            now = calculator.ask(structure)
        except NoAnswer as why:
            raise UserError(f"{name} of {store}: the calculator fails on it now: {why}.") from None
        asked += 1
        for column in columns:
            if column.name not in now or column.name not in kept:
                continue
            size = len(structure.numbers)
            value = difference(column, kept[column.name], now[column.name], size)
            if column.name not in worst or value > worst[column.name].value:
                limit = usual(column.name, card.dependence)
                worst[column.name] = Difference(column.name, value, name, limit)
    refuse_drift(list(worst.values()), store)
    lines = [f"{asked} structures were asked about again; the largest differences:"]
    return lines + [f"  {one.column:<28} {one.value:.2e}" for one in worst.values()]


def _drawn(
    stored: StoredTeacher, columns: Sequence[Column], samples: int
) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    """Entries of a store: what each is called, its structure, and what is kept of it."""
    draw = random.SystemRandom()
    shards = [shard for shard in stored.reader.shards if len(shard.entries)]
    for _ in range(samples if shards else 0):
        shard = draw.choices(shards, [len(one.entries) for one in shards])[0]
        row = draw.randrange(len(shard.entries))
        structure = stored.reader.structure(shard, row)
        own = [column for column in columns if column.name in shard.names]
        kept = shard.values(row, [column.name for column in own])
        if structure is None or kept is None or not fits(kept, len(structure.numbers), own):
            continue  # damaged, which is told elsewhere
        yield f"record {row} of {shard.name}", structure, kept
