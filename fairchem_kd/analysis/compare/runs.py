"""A comparison of finished runs, from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.compare import tables as shown
from fairchem_kd.analysis.compare.comparison import (
    TEACHER,
    Comparison,
    assign_roles,
    compare,
    group_by_recipe,
)
from fairchem_kd.analysis.compare.plots import figures
from fairchem_kd.analysis.subjects.runs import ModelFile, read_model, read_named
from fairchem_kd.analysis.subjects.splits import given_split, splits_of_run
from fairchem_kd.errors import UserError
from fairchem_kd.machine import choose_device
from fairchem_kd.report.study import Study


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    Attributes:
        teacher: its checkpoint or run; the runs' own where it is None.
        baselines: labels of the models that the others are compared with; those trained plainly
            where none are named.
        splits: ``[NAME=]PATH`` of labelled data; the runs' test sets where none are named.
        throughput: measure it.
        batch_size: structures at a time.
        atoms: whose forces count, ``free`` or ``all``; as in the configs where it is None.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle files that may run code.
    """

    teacher: Path | None = None
    baselines: Sequence[str] = ()
    splits: Sequence[str] = ()
    throughput: bool = True
    batch_size: int = 32
    atoms: str | None = None
    cpu: bool = False
    trust: bool = False


def compare_runs(runs: Sequence[str], options: Options) -> tuple[Comparison, list[str]]:
    """The comparison of runs, checkpoints or ``LABEL=RUN``, and what is to be said about it.

    Raises:
        UserError: runs or data that cannot be compared.
    """
    named = read_named(runs, trust=options.trust)
    teacher, note = _teacher(options, [file for _, file in named])
    groups = assign_roles(group_by_recipe(named), teacher=teacher, baselines=options.baselines)
    students = [group for group in groups if group.role != TEACHER] or groups
    files = [file for group in students for file in group.files]
    splits = _splits(options.splits, [file.config for file in files])
    if not options.splits:  # all name the same: one run among them means it
        meant = next((file for file in files if file.in_run), files[0])
        for split in splits.values():
            meant.check_data(split, f"give --split {split['src']}")
    comparison = compare(
        groups,
        splits,
        device=choose_device(cpu=options.cpu),
        batch_size=options.batch_size,
        free_atoms=None if options.atoms is None else options.atoms == "free",
        throughput=options.throughput,
        progress=True,
    )
    return comparison, [note] if note else []


def as_study(comparison: Comparison, notes: Sequence[str] = ()) -> Study:
    """A comparison as it is shown: tables, verdicts and plots."""
    return Study(
        "compare",
        tables=partial(shown.tables, comparison),
        figures=partial(figures, comparison),
        as_dict=partial(shown.as_dict, comparison),
        sentences=[*shown.verdicts(comparison), *notes],
        table_file="table.md",
        values_file="results.json",
        arrays=partial(shown.arrays, comparison),
        arrays_file="systems.npz",
    )


def study(runs: Sequence[str], options: Options) -> Study:
    """Compare runs; see :func:`compare_runs`."""
    return as_study(*compare_runs(runs, options))


def _teacher(options: Options, files: Sequence[ModelFile]) -> tuple[ModelFile | None, str]:
    """The teacher's file, given or the runs' own, and what to say where there is none."""
    if options.teacher is not None:
        return read_model(options.teacher, trust=options.trust), ""
    named = {file.teacher: file for file in files if file.teacher is not None}
    if len(named) > 1:
        (one, first), (other, second), *_ = named.items()
        raise UserError(
            f"{first.path} was distilled from {one}, and {second.path} from {other}: compare with "
            "one teacher at a time, or name the one that counts with --teacher."
        )
    for path in named:
        if not Path(path).exists():
            return (
                None,
                f"The teacher {path} is not there, so no gap is given: name it with --teacher.",
            )
        return read_model(path, trust=options.trust), ""
    for file in files:
        if file.has_teachers:
            return (
                None,
                f"{file.path} was distilled from an ensemble, so no gap is given: name one of its "
                "members, or what it is to be measured against, with --teacher.",
            )
    return None, ""


def _splits(
    given: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The splits named, or those that the runs' configs agree on."""
    if given:
        pairs = [given_split(text, configs[0]) for text in given]
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"Two splits are called {twice}: write --split NAME=PATH.")
        return dict(pairs)
    found = [splits_of_run(config) for config in configs]
    paths = [{name: Path(s["src"]) for name, s in one.items()} for one in found]
    for other in paths:
        if other != paths[0]:
            here, there = (", ".join(map(str, p.values())) or "nothing" for p in (paths[0], other))
            raise UserError(
                f"The runs were evaluated on different data ({here}; {there}): say on which to "
                "compare them with --split PATH."
            )
    if not found[0]:
        raise UserError("The runs' configs name no test set: give one with --split PATH.")
    return found[0]
