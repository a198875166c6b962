"""Rounds of training and exploring, from a training's config to the table.

    student 0 <- the config as it is, or one that is there
    student k <- student k - 1, with what the dynamics of students 0 to k - 1 have found
    control k <- control k - 1, with as many rattled structures

and, where a final student is asked for, of k rounds,

    final     <- student 0, with all that the last student had, for as long as k trainings
    control   <- student 0, with as many rattled structures, for as long

Short trainings, each of which lets its learning rate fall, gain less than a long one with the same
frames. It begins with student 0, as the rounds did, so that it takes as many steps as they; from
scratch it would have to learn first what student 0 knows, in those few steps or in many more.

Whatever has ended stays: a training by its records, an exploration by its card. So rounds that were
killed go on where they were, in the midst of a training too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.compare.evaluation import evaluate
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.splits import count_structures, open_split, splits_of_run
from fairchem_kd.data.pool import make_pool
from fairchem_kd.errors import UserError
from fairchem_kd.explore.assembling import NothingKept
from fairchem_kd.explore.exploration import Plan, explore
from fairchem_kd.explore.potentials import ModelPotential, Potential
from fairchem_kd.explore.rounds.table import Row, table_of
from fairchem_kd.explore.rounds.trainings import STORE, student_of, train, write_config
from fairchem_kd.explore.settings import RATTLE, Settings, Window
from fairchem_kd.explore.starts import Source, read_starts
from fairchem_kd.explore.storing import Noting
from fairchem_kd.files import write_json
from fairchem_kd.machine import choose_device
from fairchem_kd.reading import read_json
from fairchem_kd.training.schedule import steps_per_epoch, stretch

ROUNDS, TABLE = "rounds.json", "table.md"
_ROOM = 1.25  # rattled copies that are made for each that is needed: some are too close, or alike


@dataclass(frozen=True)
class Rounds:
    """What is done in all rounds.

    Args:
        config: of the first training, without includes.
        out: the folder of everything.
        sources: with what explorations begin.
        apart_from: the splits that students are judged by.
        settings: of the students' dynamics; ``most`` is what a round may add.
        teacher: is asked on the way.
        told: what it is known by.
        rounds: how often a student explores and trains on.
        limit: structures of a source that dynamics begin with, at most.
        budget: structures that all rounds together may add.
        epochs: of the trainings after the first; None: as many as that has.
        rate: their learning rate, ``optim.lr_initial``; None: that of the first.
        control: train the students with rattled structures too.
        final: train once more, from student 0, on all that was found.
        seed: of the trainings.
        cpu: use the CPU even where there is CUDA.
        noting: fills the store of a teacher that trainings cannot ask themselves.
        student: the checkpoint to begin with, in place of one that is trained with the config.
        say: takes lines.
    """

    config: Mapping[str, Any]
    out: Path
    sources: Sequence[Source]
    apart_from: Sequence[Source]
    settings: Settings
    teacher: Potential
    told: Mapping[str, Any]
    rounds: int
    limit: int | None = None
    budget: int | None = None
    epochs: int | None = None
    rate: float | None = None
    control: bool = True
    final: bool = False
    seed: int = 0
    cpu: bool = False
    noting: Noting | None = None
    student: Path | None = None
    say: Callable[[str], Any] = print


def run_rounds(plan: Rounds, lock: int) -> list[Row]:
    """Do what has not been done yet, and tell of each student; returns all rows.

    Args:
        plan: what to do.
        lock: of :func:`fairchem_kd.explore.rounds.trainings.claimed`.

    Raises:
        UserError: a training or an exploration that will not do.
    """
    running = _Running(plan, lock)
    running.students()
    final = plan.final and running.has_several
    if final:
        running.final_student()
    elif plan.final:
        running.note_final()
    if plan.control and len(running.added) > 0:
        running.final_control() if final else running.controls()
    return running.rows


class _Running:
    """The rounds under way."""

    def __init__(self, plan: Rounds, lock: int) -> None:
        self.plan = plan
        self.lock = lock
        self.rows: list[Row] = []
        self.added: list[int] = []  # structures, round by round
        self.found: list[Path] = []  # splits of what those rounds have found
        self.window: Window | None = plan.settings.window
        self.split = ""
        self.first: Path | None = None  # student 0
        self.notes: list[str] = []

    def students(self) -> None:
        """Train and explore until there is nothing left to learn, or no budget."""
        student: Path | None = None
        for number in range(self.plan.rounds + 1):
            folder = self.plan.out / f"round_{number}"
            if number == 0 and self.plan.student is not None:
                folder.mkdir(parents=True, exist_ok=True)
                student = self.plan.student
            else:
                student = self._train(folder, self.found, student)
            self.first = self.first or student
            most = self._left()
            told = self._dynamics(folder / "frames", student, most, number)
            errors = self._errors(folder, student)
            row = Row(f"student {number}", sum(self.added), errors, told)
            self._tell(row)
            if row.is_content:
                self._note("The window is empty: its dynamics found nothing left to learn.")
                return
            if number == self.plan.rounds:
                return
            if most == 0:
                self._note("The budget of structures is spent.")
                return
            if not told["kept"]:
                self._note("Nothing new was found that could be kept.")
                return
            self.added.append(told["kept"])
            self.found += _splits_in(folder / "frames")

    @property
    def has_several(self) -> bool:
        """Whether more than one round has added something."""
        return len(self.added) > 1

    def note_final(self) -> None:
        """Say why there is no final student."""
        if self.added:
            self._note("There was one round: its student is what a final one would be.")

    def final_student(self) -> None:
        """One training on all that the rounds have added, as long as theirs together."""
        self._finally(self.plan.out / f"final_{len(self.added)}", self.found, "final")

    def final_control(self) -> None:
        """The same from rattling alone."""
        found = []
        for number, needed in enumerate(self.added, start=1):
            found += self._rattle(self.plan.out / f"rattled_{number}/frames", number, needed)
        folder = self.plan.out / f"rattled_final_{len(self.added)}"
        self._finally(folder, found, "rattled alone")

    def _finally(self, folder: Path, found: Sequence[Path], name: str) -> None:
        student = self._train(folder, found, self.first, trainings=len(self.added))
        told = self._dynamics(folder / "dynamics", student, 1, len(self.added))
        self._tell(Row(name, sum(self.added), self._errors(folder, student), told))

    def controls(self) -> None:
        """The same from rattling alone: as many structures in each round, and as many steps."""
        student, found = self.first, list[Path]()
        for number, needed in enumerate(self.added, start=1):
            folder = self.plan.out / f"rattled_{number}"
            found += self._rattle(folder / "frames", number, needed)
            student = self._train(folder, found, student)
        if student is None:
            return
        folder = self.plan.out / f"rattled_{len(self.added)}"
        told = self._dynamics(folder / "dynamics", student, 1, len(self.added))
        errors = self._errors(folder, student)
        self._tell(Row("rattled alone", sum(self.added), errors, told))

    def _left(self) -> int | None:
        """Structures that the next round may add; None: all that it finds."""
        limits = [self.plan.settings.most]
        if self.plan.budget is not None:
            limits.append(max(0, self.plan.budget - sum(self.added)))
        given = [one for one in limits if one is not None]
        return min(given) if given else None

    def _train(
        self, folder: Path, found: Sequence[Path], start: Path | None, trainings: int = 1
    ) -> Path:
        """A student, trained with what was found before, as long as so many trainings of rounds."""
        done = student_of(folder)
        if done is not None:
            return done
        self.plan.say(f"{folder}: training" + (f" on from {start}" if start else ""))
        config = write_config(folder, self._config(folder, found, trainings))
        if self.plan.noting is not None:
            self.plan.noting.fill_for_training(config)
        return train(
            folder,
            config,
            start=start,
            seed=self.plan.seed,
            more=["--cpu"] if self.plan.cpu else [],
            lock=self.lock,
            stores=self.plan.out / STORE,
        )

    def _config(self, folder: Path, found: Sequence[Path], trainings: int) -> dict[str, Any]:
        """The config, after the first with what was found beside its unlabelled structures."""
        config = copy.deepcopy(dict(self.plan.config))
        if not found:
            return config
        block = config["task"]["distillation"]
        unlabelled = dict(block.get("unlabelled") or {})
        dataset = dict(unlabelled.get("dataset") or {})
        own = [Path(dataset["src"])] if dataset.get("src") else []
        pool = folder / "pool"
        if not pool.is_dir():
            make_pool(pool, [*own, *found])
        block["unlabelled"] = {**unlabelled, "dataset": {"format": "lmdb", "src": str(pool)}}
        if self.plan.epochs is not None or trainings > 1:
            labelled = count_structures(config["dataset"]["train"])
            epochs = self.plan.epochs or int(config["optim"]["max_epochs"])
            config = stretch(config, trainings * epochs, steps_per_epoch(config, labelled))
        if self.plan.rate is not None:
            config["optim"] = {**config["optim"], "lr_initial": self.plan.rate}
        return config

    def _dynamics(self, dest: Path, student: Path, most: int | None, number: int) -> dict[str, Any]:
        """What the student's dynamics showed; what they found is in ``dest``.

        Each round's have other velocities. With the same ones a student would go where the one
        before it went, for as long as dynamics take, and that is what it was trained on.
        """
        kept = dest.with_suffix(".json")  # where nothing was found there is no card
        known = _read(kept)
        if known is None:
            most = None if most is None else max(most, 1)
            given = self.plan.settings
            settings = replace(given, window=self.window, most=most, seed=given.seed + number)
            model = ModelPotential(student, cpu=self.plan.cpu)
            plan = Plan(
                self.plan.sources,
                settings,
                self.plan.teacher,
                model,
                self.plan.limit,
                told={**self.plan.told, "student": str(student)},
                apart_from=self.plan.apart_from,
                known=[Source(path, path.name) for path in self.found],
            )
            self.plan.say(f"{dest}: exploring with {student}")
            try:
                known = self._explore(plan, dest)
            except NothingKept as nothing:
                known = nothing.told
            write_json(kept, known)
        if self.window is None:
            self.window = Window(*known["window"])
        return known

    def _rattle(self, dest: Path, number: int, needed: int) -> list[Path]:
        """As many rattled structures as a round of the student's dynamics has found."""
        self.plan.say(f"{dest}: rattling")
        starts = sum(_count(source, self.plan.limit) for source in self.plan.sources)
        settings = replace(
            self.plan.settings,
            mode=RATTLE,
            window=None,
            seed=self.plan.settings.seed + number,
            most=needed,
            copies=1 + math.ceil(_ROOM * needed / max(starts, 1)),
        )
        plan = Plan(
            self.plan.sources,
            settings,
            self.plan.teacher,
            limit=self.plan.limit,
            told=self.plan.told,
            apart_from=self.plan.apart_from,
        )
        made = self._explore(plan, dest)["kept"]
        if made != needed:
            self._note(f"Round {number} of rattling alone has {made} structures, not {needed}.")
        return _splits_in(dest)

    def _explore(self, plan: Plan, dest: Path) -> dict[str, Any]:
        """Explore; what the card tells of how it went."""
        noting = self.plan.noting
        keep = None if noting is None else partial(noting.keep, dest)
        told: dict[str, Any] = explore(plan, dest, keep=keep)["exploration"]
        return told

    def _errors(self, folder: Path, student: Path) -> dict[str, float]:
        """On the first split that the run is judged by; nothing where there is none."""
        kept = folder / "errors.json"
        known = _read(kept)
        if known is None:
            file = read_model(student)
            splits = splits_of_run(file.config)
            if not splits:
                return {}
            name, settings = next(iter(splits.items()))
            model = load_model(file, choose_device(cpu=self.plan.cpu))
            with open_split(settings, name) as split:
                metrics = evaluate(model, split).metrics
            known = {"split": name, "energy": metrics["energy_mae"]}
            if "forces_mae" in metrics:
                known["forces"] = metrics["forces_mae"]
            write_json(kept, known)
        self.split = str(known.get("split", ""))
        return {key: value for key, value in known.items() if key != "split"}

    def _tell(self, row: Row) -> None:
        """Write and print all that is known."""
        self.rows.append(row)
        self._write()

    def _note(self, words: str) -> None:
        self.notes.append(words)
        self._write()

    def _write(self) -> None:
        table = table_of(self.rows, self.split, self.notes)
        window = None if self.window is None else [self.window.low, self.window.high]
        told = {"window": window, "rows": [row.as_dict() for row in self.rows]}
        write_json(self.plan.out / ROUNDS, {**told, "notes": self.notes})
        (self.plan.out / TABLE).write_text(table.markdown() + "\n", "utf-8")
        self.plan.say(table.text())


def _splits_in(dataset: Path) -> list[Path]:
    return sorted(one for one in dataset.iterdir() if one.is_dir() and any(one.glob("*.lmdb")))


def _count(source: Source, limit: int | None) -> int:
    return sum(1 for _ in read_starts(source, limit))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def check_same(out: Path, told: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than those that rounds in this folder began with.

    Args:
        out: the folder of all rounds.
        told: all that decides what they do; plain values.

    Raises:
        UserError: they differ; naming the first that does.
    """
    file = out / "options.json"
    wanted = json.loads(json.dumps(told))
    known = _read(file)
    if known is None:
        foreign = [one for one in out.iterdir() if one.name != ".lock"]
        if foreign:
            raise UserError(
                f"{out} holds {foreign[0].name!r} and is no folder of rounds: name another one "
                "with --out."
            )
        write_json(file, wanted)
        return
    for key in sorted({*known, *wanted}):
        if known.get(key) != wanted.get(key):
            raise UserError(
                f"{out} has rounds with another {key} ({known.get(key)!s:.60}, and now "
                f"{wanted.get(key)!s:.60}): give what it was, or name another folder with --out."
            )
