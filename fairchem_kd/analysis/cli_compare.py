"""``fairchem-kd compare``: what distillation gained, over any number of runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.analysis.cli_output import add_output_arguments, as_text, check_output, deliver
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.analysis.compare import Comparison
    from fairchem_kd.analysis.models import ModelFile

EPILOG = """\
RUN is the folder of a run (checkpoints/<timestamp>-<identifier>), a checkpoint of any fairchem 1.x
model, or LABEL=RUN. Runs that differ by the seed alone count as seeds of one model, and so do
runs of one LABEL. The teacher is the one that the runs were distilled from, the baseline the run
without distillation losses, the data the runs' test set (and test_ood beside it).

  fairchem-kd compare checkpoints/*-plain checkpoints/*-e2n
  fairchem-kd compare plain=runs/a plain=runs/b e2n=runs/c e2n=runs/d --out comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd compare``."""
    parser.description = (
        "Evaluate teacher, plain and distilled students on the same structures: errors, the gap "
        "that distillation closed with confidence intervals, throughput, plots."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_comparison_arguments(parser)
    add_output_arguments(parser, "table.md, results.json, systems.npz")


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and how: for :func:`compare_runs`."""
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="runs or checkpoints")
    parser.add_argument("--teacher", type=Path, help="its checkpoint (default: the runs' own)")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="LABEL",
        help="the model that the others are compared with (default: the one trained plainly)",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="labelled data to compare on, any number of times (default: the runs' test set)",
    )
    parser.add_argument("--no-throughput", action="store_true", help="do not measure throughput")
    parser.add_argument("--batch-size", type=int, default=32, help="structures at a time (32)")
    parser.add_argument(
        "--atoms", choices=("free", "all"), help="whose forces count (default: as in the configs)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print and write; returns the exit code.

    Raises:
        UserError: runs or data that cannot be compared.
    """
    check_output(args)
    comparison, notes = compare_runs(args)
    from fairchem_kd.analysis import report

    said = [*report.verdicts(comparison), *notes]
    deliver(
        args,
        text=lambda: "\n".join([as_text(report.tables(comparison)), "", *said]),
        content=lambda: report.as_dict(comparison),
        write=partial(report.write, comparison),
    )
    return 0


def compare_runs(args: argparse.Namespace) -> tuple[Comparison, list[str]]:
    """The comparison that the options ask for, and what is to be said about it.

    Raises:
        UserError: runs or data that cannot be compared.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}.")
    from fairchem_kd.analysis.compare import assign_roles, compare, group_by_recipe
    from fairchem_kd.analysis.devices import choose_device

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


def read_named(runs: Sequence[str], *, trust: bool) -> list[tuple[str | None, ModelFile]]:
    """What each ``[LABEL=]RUN`` names: its label, where it has one, and its file.

    With a label, RUN may be a pattern (``e2n=checkpoints/*-e2n-s?``), which shells leave as it is.
    """
    from fairchem_kd.analysis.models import read_model

    named = [(label, one) for label, path in map(_split_label, runs) for one in _matching(path)]
    return [(label, read_model(path, trust=trust)) for label, path in named]


def _matching(path: Path) -> list[Path]:
    """What a pattern matches, in order; a path that is none as it is."""
    if path.exists() or not any(mark in str(path) for mark in "*?["):
        return [path]
    found = [Path(name) for name in sorted(glob(str(path)))]
    if not found:
        raise UserError(f"Nothing in {Path.cwd()} matches {path}; name runs that are there.")
    return found


def _split_label(text: str) -> tuple[str | None, Path]:
    """Label and path of ``[LABEL=]RUN``; a path that has an ``=`` of its own is a path."""
    label, separator, path = text.partition("=")
    if not separator or Path(text).exists() or "/" in label:
        return None, Path(text)
    if not label or not path:
        raise UserError(f"'{text}' is no run: write LABEL=RUN, or RUN alone.")
    return label, Path(path)


def _teacher(args: argparse.Namespace, files: Sequence[Any]) -> tuple[Any, str]:
    """The teacher's file, given or the runs' own, and what to say where there is none."""
    from fairchem_kd.analysis.models import read_model

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
    from fairchem_kd.analysis.splits import given_split, splits_of_run

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
