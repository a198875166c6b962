"""``fairchem-kd compare``: what distillation gained, over any number of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.commands.output import add_output_arguments, check_output, deliver

if TYPE_CHECKING:
    from fairchem_kd.analysis.compare.runs import Options

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
    """What is compared, and how: for :func:`comparison_options`."""
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
    parser.add_argument(
        "--batch-size", type=at_least(1), default=32, help="structures at a time (32)"
    )
    parser.add_argument(
        "--atoms", choices=("free", "all"), help="whose forces count (default: as in the configs)"
    )


def comparison_options(args: argparse.Namespace) -> Options:
    """What :func:`add_comparison_arguments` asked for."""
    from fairchem_kd.analysis.compare.runs import Options

    return Options(
        teacher=args.teacher,
        baselines=args.baseline,
        splits=args.split,
        throughput=not args.no_throughput,
        batch_size=args.batch_size,
        atoms=args.atoms,
        cpu=args.cpu,
        trust=args.trust,
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print and write; returns the exit code.

    Raises:
        UserError: runs or data that cannot be compared.
    """
    check_output(args)
    from fairchem_kd.analysis.compare.runs import study

    deliver(args, study(args.runs, comparison_options(args)))
    return 0
