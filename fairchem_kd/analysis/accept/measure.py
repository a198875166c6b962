"""What the bars ask for, measured: each figure with its value, or with why there is none."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.calculators.calculator import CalculationFailed

from fairchem_kd.analysis.accept.bars import ERRORS, FIGURES, GAP, PHYSICS, SPEED
from fairchem_kd.analysis.compare.evaluation import Evaluation, evaluate
from fairchem_kd.analysis.compare.gap import Interval, gap_closed
from fairchem_kd.analysis.cost.inference import measure_md
from fairchem_kd.analysis.physics.study import Physics, Settings, study_physics
from fairchem_kd.analysis.physics.summary import STATISTICS, Measured, values_of
from fairchem_kd.analysis.subjects.calculators import atoms_of
from fairchem_kd.analysis.subjects.reference_method import METHODS, method_of
from fairchem_kd.analysis.subjects.runs import ModelFile, load_model
from fairchem_kd.analysis.subjects.splits import open_split
from fairchem_kd.analysis.subjects.structures import data_of, open_structures
from fairchem_kd.errors import UserError
from fairchem_kd.md import StudentCalculator

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class Value:
    """A figure, in the unit of `FIGURES`; ``why`` says why there is none, or none better."""

    value: float | None = None
    interval: Interval | None = None  #: 95 %, over structures
    why: str = ""
    where: str = ""  #: which split it is of


@dataclass
class Subject:
    """What is judged, by what.

    Attributes:
        student, teacher, baseline: files of models; the two others where there are any.
        why_no_teacher: what to say where there is none.
        splits: settings of labelled data by name.
        data: structures to run from; the student's own test set where none are named.
        structures: how many of them.
        method: of the labels, ``auto`` or ``none``.
        settings: of dynamics and relaxations.
        device: where the models run.
    """

    student: ModelFile
    teacher: ModelFile | None
    baseline: ModelFile | None
    splits: Mapping[str, Mapping[str, Any]]
    why_no_teacher: str = "no teacher is known: name it with --teacher"
    data: str | None = None
    structures: int = 5
    method: str = "auto"
    settings: Settings = field(default_factory=Settings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def measure(subject: Subject, names: Collection[str]) -> dict[str, Value]:
    """The figures ``names``, and nothing that they do not need.

    Raises:
        UserError: data or models that cannot be used at all.
    """
    groups = {FIGURES[name].group for name in names}
    found: dict[str, Value] = {}
    if groups & {ERRORS, GAP}:
        found |= _errors(subject, gap=GAP in groups)
    if groups & {PHYSICS, SPEED}:
        if "forces" not in (subject.student.config.get("outputs") or {}):
            missing = Value(why="the student predicts no forces")
            found |= {n: missing for n, f in FIGURES.items() if f.group in (PHYSICS, SPEED)}
        else:
            source = subject.data or data_of(subject.student)
            with open_structures(source, limit=subject.structures) as opened:
                atoms, path = atoms_of(opened), opened.path
            student = _calculator(subject.student, subject.device)
            if PHYSICS in groups:
                wanted = [name for name in names if FIGURES[name].group == PHYSICS]
                found |= _physics(subject, student, atoms, source, path, wanted)
            if SPEED in groups:
                found |= _speed(subject, student, atoms)
    nothing = Value(why="nothing was found of it")
    return {name: found.get(name, nothing) for name in names}


# -- errors and gap --------------------------------------------------------------------------------


def _errors(subject: Subject, *, gap: bool) -> dict[str, Value]:
    if not subject.splits:
        missing = Value(why="the student's config names no test set: give --split")
        return {name: missing for name, one in FIGURES.items() if one.group in (ERRORS, GAP)}
    students = _evaluated(subject.student, subject)
    found = {}
    for name, figure in FIGURES.items():
        if figure.group == ERRORS:
            values = {split: one.metrics.get(name) for split, one in students.items()}
            found[name] = _worst(values, smallest=figure.sense == "at least")
    if gap:
        found |= _gap(subject, students)
    return found


def _gap(subject: Subject, students: Mapping[str, Evaluation]) -> dict[str, Value]:
    why = ""
    if subject.teacher is None:
        why = subject.why_no_teacher
    elif subject.baseline is None:
        why = "no baseline is known: name the student without distillation with --baseline"
    if why or subject.teacher is None or subject.baseline is None:
        return {name: Value(why=why) for name, one in FIGURES.items() if one.group == GAP}
    teachers = _evaluated(subject.teacher, subject)
    baselines = _evaluated(subject.baseline, subject)
    found = {}
    for kind in ("energy", "forces"):
        closed: dict[str, float | None] = {}
        why = ""
        for split, student in students.items():
            by = {"baseline": baselines[split], "student": student, "teacher": teachers[split]}
            errors = {name: one.metrics.get(f"{kind}_mae") for name, one in by.items()}
            known = [error for error in errors.values() if error is not None]
            if len(known) < len(errors):
                silent = next(name for name, error in errors.items() if error is None)
                why = why or f"the {silent} predicts no {kind}"
                continue
            closed[split] = gap_closed(*known)
            if closed[split] is None:
                why = why or f"on {split} the teacher is not better than the baseline"
        found[f"{kind}_gap_closed"] = Value(why=why) if why else _worst(closed, smallest=True)
    return found


def _worst(values: Mapping[str, float | None], *, smallest: bool) -> Value:
    known = {split: value for split, value in values.items() if value is not None}
    if len(known) < len(values):
        return Value(why="the student predicts no forces")
    strange = [split for split, value in known.items() if not math.isfinite(value)]
    if strange:  # which no order knows
        return Value(why=f"on {strange[0]} it is not finite")
    split = (min if smallest else max)(known, key=lambda name: known[name])
    return Value(known[split], where=split)


def _evaluated(file: ModelFile, subject: Subject) -> dict[str, Evaluation]:
    """Stock's evaluation of a model on every split."""
    forces = (subject.student.config.get("outputs") or {}).get("forces") or {}
    model = load_model(file, subject.device)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_split(s, name)) for name, s in subject.splits.items()]
        free = bool(forces.get("eval_on_free_atoms", True))
        return {split.name: evaluate(model, split, free_atoms=free) for split in opened}


# -- as a potential, and how fast ------------------------------------------------------------------


def _calculator(file: ModelFile, device: torch.device) -> StudentCalculator:
    return StudentCalculator(file.path, device=device, trust=file.trust)


#: What is measured for a figure, by how its name begins.
_PARTS = {"md": "dynamics", "relax": "relaxations", "force": "forces", "scan": "scans"}
_BY_THE_METHOD = ("relax_energy_above", "relax_displacement", "scan_error")
_OF_DYNAMICS_THAT_LAST = ("md_drift", "md_fluctuation")


def _physics(
    subject: Subject,
    student: StudentCalculator,
    atoms: Sequence[Atoms],
    source: Any,
    path: str,
    names: Collection[str],
) -> dict[str, Value]:
    method = METHODS.get(subject.method)
    if subject.method == "auto":
        method = method_of(source if isinstance(source, Mapping) else {"src": str(source)})
    if not set(names) & set(_BY_THE_METHOD):
        method = None  # which is often the slowest of all
    found = study_physics(
        {"student": [student]},
        atoms,
        method=method,
        data=path,
        settings=subject.settings,
        parts={_PARTS[name.partition("_")[0]] for name in names},
    )
    summary = found.summary("student")
    return {name: _figure(found, name, summary[name]) for name in names}


def _figure(found: Physics, name: str, measured: Measured | None) -> Value:
    """One figure over all structures; one of which the student gives none counts as the worst."""
    ours, truth = found.models["student"][0], None
    if name in _BY_THE_METHOD:
        if found.method is None:
            return Value(why="the method of the labels is not known: give --method")
        truth = found.models[found.method][0]
    values = values_of(ours, truth)[name]
    lost = ~np.isfinite(values)
    if name in _OF_DYNAMICS_THAT_LAST:
        lost |= np.array([not one.stable for one in ours.dynamics])
    if truth is not None:  # no one is held against what the method cannot say
        known = np.isfinite(values_of(truth, truth)[name])
        values, lost = values[known], lost[known]
    if not len(values) or (lost.all() and name not in _OF_DYNAMICS_THAT_LAST):
        return Value(why="no structure gave a value")
    if not lost.any() and measured is not None:
        return Value(measured.value, measured.over_structures)
    reasons = [one.reason for one in ours.dynamics if one.reason]
    why = f"{lost.sum()} of {len(lost)} structures gave none"
    if name in _OF_DYNAMICS_THAT_LAST and reasons:
        why = f"{lost.sum()} of {len(lost)} runs do not last ({reasons[0]})"
    if not np.iscomplexobj(values):  # a ratio of sums knows no worst
        value = float(STATISTICS[name](np.where(lost, np.inf, values)))
        if math.isfinite(value):
            return Value(value, why=f"{why}, and count as the worst")
    return Value(why=why)


def _speed(
    subject: Subject, student: StudentCalculator, atoms: Sequence[Atoms]
) -> dict[str, Value]:
    calculators = {"student": student}
    why = subject.why_no_teacher
    if subject.teacher is not None:
        try:
            calculators["teacher"] = _calculator(subject.teacher, subject.device)
        except UserError as error:
            why = f"the teacher cannot run dynamics: {error}"
    try:
        timings = measure_md(calculators, atoms[0], steps=15, warm_up=3)
    except CalculationFailed as error:
        return dict.fromkeys(("md_steps_per_second", "md_speedup"), Value(why=str(error)))
    median = {label: timing.median for label, timing in timings.items()}
    found = {"md_steps_per_second": Value(1.0 / median["student"])}
    found["md_speedup"] = Value(why=why)
    if "teacher" in median:
        found["md_speedup"] = Value(median["teacher"] / median["student"])
    return found


def named_teacher(student: ModelFile, given: Path | None, trust: bool) -> tuple[Any, str]:
    """The teacher's file, given or the student's own, and what to say where there is none.

    Raises:
        UserError: the one that is given cannot be read.
    """
    from fairchem_kd.analysis.subjects.runs import read_model

    if given is not None:
        return read_model(given, trust=trust), ""
    if student.teacher is None:
        return None, Subject.why_no_teacher
    if not Path(student.teacher).exists():
        return None, f"the teacher {student.teacher} is not there: name it with --teacher"
    return read_model(student.teacher, trust=trust), ""
