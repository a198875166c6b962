"""A comparison of finished runs, from their folders."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.compare.comparison import Comparison
from fairchem_kd.analysis.subjects.runs import read_named
from fairchem_kd.errors import UserError


def compare_runs(args: argparse.Namespace) -> tuple[Comparison, list[str]]:
    """The comparison that the options ask for, and what is to be said about it.

    Raises:
        UserError: runs or data that cannot be compared.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}.")
    from fairchem_kd.analysis.compare.comparison import assign_roles, compare, group_by_recipe
    from fairchem_kd.machine import choose_device

    named = read_named(args.runs, trust=args.trust)
    teacher, note = _teacher(args, [file for _, file in named])
    groups = assign_roles(group_by_recipe(named), teacher=teacher, baselines=args.baseline)
    students = [group for group in groups if group.role != "teacher"] or groups
    splits = _splits(args.split, [file.config for group in students for file in group.files])
    comparison = compare(
        groups,
        splits,
        device=choose_device(cpu=args.cpu),
        batch_size=args.batch_size,
        free_atoms=None if args.atoms is None else args.atoms == "free",
        throughput=not args.no_throughput,
        progress=True,
    )
    return comparison, [note] if note else []


def _teacher(args: argparse.Namespace, files: Sequence[Any]) -> tuple[Any, str]:
    """The teacher's file, given or the runs' own, and what to say where there is none."""
    from fairchem_kd.analysis.subjects.runs import read_model

    if args.teacher is not None:
        return read_model(args.teacher, trust=args.trust), ""
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
        return read_model(path, trust=args.trust), ""
    return None, ""


def _splits(
    given: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The splits named, or those that the runs' configs agree on."""
    from fairchem_kd.analysis.subjects.splits import given_split, splits_of_run

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
