"""``fairchem-kd cost``: how fast teacher and students are, and what distilling costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.commands.output import add_output_arguments, check_output, deliver
from fairchem_kd.errors import UserError

EPILOG = """\
A RUN is the folder of a run or a checkpoint. Inference is measured of the teacher (the one that the
runs were distilled from) and of every architecture among the runs; training of the distilled runs,
whose data and teacher have to be there.

  fairchem-kd cost checkpoints/*-e2n --batch-sizes 1,8,32 --out cost
  fairchem-kd cost small.pt --teacher large.pt --data structures.extxyz --no-training
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd cost``."""
    parser.description = (
        "Throughput, memory and time per MD step of teacher and students, side by side; what a "
        "step of training costs with and without distillation, and where the time goes."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="(default: the runs' own)")
    parser.add_argument(
        "--data", metavar="PATH", help="structures for inference (default: the runs' test set)"
    )
    parser.add_argument("--batch-sizes", default="1,8,32", metavar="N,N", help="(1,8,32)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=7, metavar="N", help="timed turns (7)"
    )
    parser.add_argument(
        "--warm-up", type=at_least(0), default=2, metavar="N", help="turns before (2)"
    )
    parser.add_argument(
        "--train-batch-size",
        type=at_least(1),
        metavar="N",
        help="in training (default: the run's own)",
    )
    parser.add_argument("--no-inference", action="store_true", help="measure training alone")
    parser.add_argument("--no-md", action="store_true", help="no MD steps")
    parser.add_argument("--no-training", action="store_true", help="measure inference alone")
    add_output_arguments(parser, "cost.md, cost.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        UserError: models or data that cannot be measured.
    """
    sizes = _sizes(args.batch_sizes)
    check_output(args)
    from fairchem_kd.analysis.cost.runs import Settings, study

    found = study(
        args.runs,
        teacher=args.teacher,
        data=args.data,
        settings=Settings(
            batch_sizes=sizes,
            repeats=args.repeats,
            warm_up=args.warm_up,
            train_batch_size=args.train_batch_size,
            inference=not args.no_inference,
            md=not args.no_md,
            training=not args.no_training,
        ),
        cpu=args.cpu,
        trust=args.trust,
    )
    deliver(args, found)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch-sizes '{text}' does not read N,N,...: for example 1,8,32.")
    return sizes
