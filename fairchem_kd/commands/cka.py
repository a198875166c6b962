"""``fairchem-kd cka``: how similar the layers of teacher and student are, before and after."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.commands.output import add_output_arguments, check_output, deliver

EPILOG = """\
A model is the folder of a run (checkpoints/<timestamp>-<identifier>) or a checkpoint. The teacher
is the one that the student was distilled from, the marked layers those of its losses, the data the
student's test set, unless you say otherwise.

  fairchem-kd cka --student checkpoints/*-e2n --before checkpoints/*-plain --out similarity
  fairchem-kd cka --teacher large.pt --student small.pt --data structures.extxyz --pair node:edge
  fairchem-kd cka --teacher one_seed.pt --student another_seed.pt --student-layers 'node@*'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd cka``."""
    parser.description = (
        "Linear CKA (unbiased) of every layer of the teacher with every layer of the student: "
        "tables, JSON and heat maps, the distilled pair marked; with --before also what "
        "distillation changed."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--student", type=Path, required=True, metavar="RUN")
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="(default: the student's own)")
    parser.add_argument(
        "--before", type=Path, metavar="RUN", help="the student without or before distillation"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="an LMDB, or a file that ASE reads; labels are not needed"
    )
    parser.add_argument(
        "--samples",
        type=at_least(0),
        default=500,
        metavar="N",
        help="structures, evenly spread; 0: all (500)",
    )
    for role in ("teacher", "student"):
        parser.add_argument(
            f"--{role}-layers",
            action="append",
            default=[],
            metavar="LAYER",
            help="addresses as `fairchem-kd inspect` lists them, or patterns ('edge@*'), any "
            "number of times",
        )
    parser.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="STUDENT:TEACHER",
        help="layers to mark (default: those that the student was distilled with)",
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="structures at a time (16)"
    )
    add_output_arguments(parser, "cka.md, cka.json", "heat maps")


def run(args: argparse.Namespace) -> int:
    """Compare, print and write; returns the exit code.

    Raises:
        UserError: models, layers or data that cannot be compared.
    """
    check_output(args)
    from fairchem_kd.analysis.cka.runs import study

    found = study(
        args.student,
        teacher=args.teacher,
        before=args.before,
        data=args.data,
        samples=args.samples,
        student_layers=args.student_layers,
        teacher_layers=args.teacher_layers,
        pairs=args.pair,
        batch_size=args.batch_size,
        cpu=args.cpu,
        trust=args.trust,
    )
    deliver(args, found)
    return 0
