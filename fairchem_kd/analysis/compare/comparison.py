"""Any number of models on the same structures: errors, gaps closed, throughput.

groups of seeds, splits -> compare -> Comparison -> report (tables, JSON, plots)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fairchem_kd.analysis.compare.evaluation import Array, Evaluation, evaluate
from fairchem_kd.analysis.compare.gap import TARGETS, Gap, measure_gap, target_errors
from fairchem_kd.analysis.cost.throughput import Throughput, measure_throughput
from fairchem_kd.analysis.subjects.runs import ModelFile, load_model
from fairchem_kd.analysis.subjects.splits import Split, open_split
from fairchem_kd.errors import UserError, did_you_mean

TEACHER, BASELINE, STUDENT = "teacher", "baseline", "student"


@dataclass
class Group:
    """One model: its checkpoint, or those of its seeds."""

    label: str
    files: list[ModelFile]
    role: str = STUDENT
    training_seconds: list[float | None] = field(default_factory=list)  #: by seed

    def __post_init__(self) -> None:
        if not self.training_seconds:
            self.training_seconds = [file.training_seconds for file in self.files]

    @property
    def architecture(self) -> str:
        """Two groups of one architecture are comparable as a student with and without a teacher."""
        from fairchem_kd.models.build import model_config

        return json.dumps(model_config(self.files[0].config), sort_keys=True, default=str)

    @property
    def seeds(self) -> list[int | None]:
        return [file.seed for file in self.files]

    @property
    def steps(self) -> int | None:
        """Optimiser steps that were taken, by the records of the first seed."""
        return max((int(r["step"]) for r in self.files[0].records() if "step" in r), default=None)


@dataclass
class SplitResult:
    """Every model's errors on one split."""

    name: str
    path: str
    evaluations: dict[str, list[Evaluation]]  #: by label: one for every seed
    gaps: dict[str, list[Gap]] = field(default_factory=dict)  #: by label: one for every target

    @property
    def systems(self) -> int:
        return len(self._sids)

    @property
    def trajectories(self) -> int:
        return len(np.unique(self._sids))

    @property
    def _sids(self) -> Array:
        return next(iter(self.evaluations.values()))[0].systems["sid"]


@dataclass
class Comparison:
    """What :func:`compare` found."""

    groups: list[Group]
    splits: list[SplitResult]
    free_atoms: bool
    parameters: dict[str, int] = field(default_factory=dict)  #: by label
    throughputs: dict[str, Throughput] = field(default_factory=dict)  #: by label
    baselines: dict[str, str] = field(default_factory=dict)  #: of a label, another one


def compare(
    groups: Sequence[Group],
    splits: Mapping[str, Mapping[str, Any]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    free_atoms: bool | None = None,
    throughput: bool = True,
    progress: bool = False,
) -> Comparison:
    """Evaluate every model on every split, and measure what distillation gained.

    Each student is compared with the baseline of its own architecture.

    Args:
        groups: with their roles; at most one teacher.
        splits: settings by name (see :func:`fairchem_kd.analysis.subjects.splits.open_split`).
        device: where the models run.
        batch_size: structures at a time, for errors and for throughput.
        free_atoms: count forces on free atoms alone; by default as the models' configs say.
        throughput: measure it, once for each architecture.
        progress: show a bar on a terminal.

    Raises:
        UserError: models or data that cannot be compared.
    """
    _check(groups)
    if free_atoms is None:
        free_atoms = _free_atoms(groups)
    result = Comparison(list(groups), [], free_atoms, baselines=_baselines(groups))
    found: dict[str, dict[str, list[Evaluation]]] = {name: {} for name in splits}
    timed: dict[str, Throughput] = {}
    with ExitStack() as stack:
        opened = [stack.enter_context(open_split(s, name)) for name, s in splits.items()]
        total = len(opened) * sum(len(group.files) for group in groups)
        bar = stack.enter_context(
            tqdm(total=total, desc="Evaluating", disable=None if progress else True)
        )
        for group in groups:
            for number, file in enumerate(group.files):
                model = load_model(file, device)
                if number == 0:
                    parameters = sum(p.numel() for p in model.model.parameters())
                    result.parameters[group.label] = parameters
                    if throughput:
                        key = group.architecture
                        if key not in timed:
                            timed[key] = measure_throughput(model, opened[0], batch_size=batch_size)
                        result.throughputs[group.label] = timed[key]
                for split in opened:
                    logging.info(f"Evaluating {file.path} on {split.name}")
                    evaluation = evaluate(
                        model, split, batch_size=batch_size, free_atoms=free_atoms
                    )
                    found[split.name].setdefault(group.label, []).append(evaluation)
                    bar.update()
        result.splits = [_result(split, found[split.name], result) for split in opened]
    return result


def _result(split: Split, found: dict[str, list[Evaluation]], so_far: Comparison) -> SplitResult:
    result = SplitResult(split.name, split.path, found)
    groups = {group.label: group for group in so_far.groups}
    teacher = next((group for group in so_far.groups if group.role == TEACHER), None)
    sids = found[so_far.groups[0].label][0].systems["sid"]
    for label, baseline in so_far.baselines.items():
        first, second, paired = _aligned(groups[baseline], groups[label])
        models = [found[baseline][i] for i in first] + [found[label][i] for i in second]
        taught = None if teacher is None else found[teacher.label][0]
        gaps = []
        for target in TARGETS:
            if target == "forces_mae" and not all(one.has_forces for one in models):
                continue
            errors = [target_errors(one.systems, target) for one in models]
            known = taught is not None and (target == "energy_mae" or taught.has_forces)
            teachers = target_errors(taught.systems, target) if taught and known else None
            gaps.append(
                measure_gap(
                    target,
                    errors[: len(first)],
                    errors[len(first) :],
                    teachers,
                    groups=sids,
                    paired=paired,
                )
            )
        result.gaps[label] = gaps
    return result


def _aligned(baseline: Group, student: Group) -> tuple[list[int], list[int], bool]:
    """The order in which the seeds of both are taken, and whether they are the same seeds."""
    first, second = baseline.seeds, student.seeds
    a, b = range(len(first)), range(len(second))
    known = None not in first and None not in second and len(set(first)) == len(first)
    if not known or sorted(first, key=str) != sorted(second, key=str):
        return list(a), list(b), False
    return sorted(a, key=lambda i: str(first[i])), sorted(b, key=lambda i: str(second[i])), True


def _check(groups: Sequence[Group]) -> None:
    labels = [group.label for group in groups]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"Two of the models are called {twice[0]}: give them labels, as in LABEL=PATH."
        )
    teachers = [group for group in groups if group.role == TEACHER]
    if len(teachers) > 1 or (teachers and len(teachers[0].files) > 1):
        names = ", ".join(str(file.path) for group in teachers for file in group.files)
        raise UserError(f"There is more than one teacher ({names}); compare with one at a time.")


def _free_atoms(groups: Sequence[Group]) -> bool:
    """Whether the models' configs evaluate forces on free atoms alone; they must agree."""
    said: dict[bool, Path] = {}
    for group in groups:
        for file in group.files:
            forces = (file.config.get("outputs") or {}).get("forces")
            if isinstance(forces, Mapping):
                said.setdefault(bool(forces.get("eval_on_free_atoms", True)), file.path)
    if len(said) > 1:
        raise UserError(
            f"{said[True]} was evaluated on free atoms and {said[False]} on all atoms "
            "(outputs.forces.eval_on_free_atoms of their configs); say on which to compare with "
            "--atoms free or --atoms all."
        )
    return next(iter(said), True)


def _baselines(groups: Sequence[Group]) -> dict[str, str]:
    """The baseline of each other student, where one of its architecture is among them."""
    known: dict[str, str] = {}
    for group in groups:
        if group.role == BASELINE:
            other = known.setdefault(group.architecture, group.label)
            if other != group.label:
                raise UserError(
                    f"{other} and {group.label} are both baselines of one architecture; name the "
                    "one that counts with --baseline."
                )
    students = [group for group in groups if group.role == STUDENT]
    return {g.label: known[g.architecture] for g in students if g.architecture in known}


def group_by_recipe(named: Sequence[tuple[str | None, ModelFile]]) -> list[Group]:
    """Groups of seeds: files of one label, or without labels, those that differ by the seed alone.

    Raises:
        UserError: one file given twice.
    """
    groups: dict[str, list[tuple[str | None, ModelFile]]] = {}
    seen: set[Path] = set()
    for label, file in named:
        path = file.path.resolve()
        if path in seen:
            raise UserError(f"{file.path} is given twice.")
        seen.add(path)
        key = f"label {label}" if label is not None else f"recipe {file.recipe}"
        if label is None and any(f.seed == file.seed for _, f in groups.get(key, [])):
            key = f"path {path}"  # the same seed again: another run, not another seed
        groups.setdefault(key, []).append((label, file))
    made: list[Group] = []
    for members in groups.values():
        files = [file for _, file in members]
        label = members[0][0]
        if label is None:
            label = files[0].identifier
            if len(files) > 1:
                label = re.sub(r"[-_. ]?s(eed)?[-_]?\d+$", "", label) or label
            if any(group.label == label for group in made):
                label = f"{label} ({files[0].path.parent.name})"
        made.append(Group(label, files))
    return made


def assign_roles(
    groups: Sequence[Group], *, teacher: ModelFile | None, baselines: Sequence[str] = ()
) -> list[Group]:
    """The teacher first, then the students; baselines are those named, or the plain students.

    Args:
        groups: of students, and of the teacher if it is among them.
        teacher: its file; None where there is none.
        baselines: labels; without any, students without distillation losses.

    Raises:
        UserError: a label that no group has, or several plain students of one architecture.
    """
    groups = list(groups)
    if teacher is not None:
        path = teacher.path.resolve()
        own = [g for g in groups if any(f.path.resolve() == path for f in g.files)]
        if own:
            groups.remove(own[0])
        label = own[0].label if own else "teacher"
        if any(group.label == label for group in groups):
            label = f"teacher {teacher.identifier}"
        groups.insert(0, Group(label, [teacher], TEACHER))
    students = [group for group in groups if group.role != TEACHER]
    labels = [group.label for group in students]
    for label in baselines:
        if label not in labels:
            raise UserError(
                f"--baseline: no model is called '{label}'{did_you_mean(label, labels)}."
            )
    if baselines:
        for group in students:
            group.role = BASELINE if group.label in baselines else STUDENT
        return groups
    plain: dict[str, list[Group]] = {}
    for group in students:
        if not group.files[0].losses:
            plain.setdefault(group.architecture, []).append(group)
    distilled = {group.architecture for group in students if group.files[0].losses}
    for architecture, candidates in plain.items():
        if len(candidates) > 1 and architecture in distilled:
            names = ", ".join(group.label for group in candidates)
            raise UserError(
                f"Several models were trained without distillation ({names}): say with --baseline "
                "which of them the others are compared with."
            )
        if len(candidates) == 1 and architecture in distilled:
            candidates[0].role = BASELINE
    return groups
