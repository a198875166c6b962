"""``fairchem-kd accept``: is this student good enough for what it is for?"""

from __future__ import annotations

import argparse
from pathlib import Path

from fairchem_kd.commands.arguments import add_physics_arguments, more_than
from fairchem_kd.commands.output import check_output, deliver
from fairchem_kd.errors import UserError

EPILOG = """\
Each bar is met, unmet or not measured; the exit status is 0 where all are met and 1 otherwise. A
file of bars has a line for each, `figure: limit`, and goes over the set that --for names;
`figure: null` takes one away. Which figures there are: docs/md.md.

  fairchem-kd accept checkpoints/*-student --for md --out accepted
  fairchem-kd accept student.pt --bars bars.yml --teacher teacher.pt --split data/test
"""
_USES = ("screening", "relaxation", "md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd accept``."""
    parser.description = (
        "Hold a student against bars: errors and gap closed on labelled data, dynamics, "
        "relaxations, forces against the energy, and steps of MD a second beside the teacher's."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("student", type=Path, metavar="STUDENT", help="a run or a checkpoint")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="YAML, `figure: limit`")
    parser.add_argument("--for", dest="use", choices=_USES, help="the bars of a use")
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="(default: the student's own)")
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="the student without distillation, for gaps"
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="labelled data (default: the student's test set); may be given again",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="structures to run from (default: its test set)"
    )
    parser.add_argument(
        "--structures", type=more_than(0), default=5, metavar="N", help="how many of them (5)"
    )
    add_physics_arguments(parser)
    parser.add_argument("--out", type=Path, help="a folder for accept.md and accept.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 0 where every bar is met, else 1.

    Raises:
        UserError: bars, models or data that will not do.
    """
    from fairchem_kd.analysis.accept.bars import bars_for

    args.no_plots = True  # there are none
    check_output(args)
    bars = bars_for(args.use, args.bars)
    from fairchem_kd.analysis.accept.measure import Subject, named_teacher
    from fairchem_kd.analysis.accept.study import accept
    from fairchem_kd.analysis.physics.study import Settings
    from fairchem_kd.analysis.subjects.runs import read_model
    from fairchem_kd.analysis.subjects.splits import given_split, splits_of_run
    from fairchem_kd.machine import choose_device

    student = read_model(args.student, trust=args.trust)
    teacher, why = named_teacher(student, args.teacher, args.trust)
    if args.split:
        pairs = [given_split(text, student.config) for text in args.split]
        splits = dict(pairs)
        if len(splits) < len(pairs):
            raise UserError("Two splits have one name: write --split NAME=PATH.")
    else:
        splits = splits_of_run(student.config)
        for settings in splits.values():
            student.check_data(settings, f"give --split {settings['src']}")
    found = accept(
        Subject(
            student=student,
            teacher=teacher,
            baseline=args.baseline and read_model(args.baseline, trust=args.trust),
            splits=splits,
            why_no_teacher=why,
            data=args.data,
            structures=args.structures,
            method=args.method,
            settings=Settings(
                md_steps=args.md_steps,
                time_step=args.time_step,
                temperature=args.temperature,
                fmax=args.fmax,
                relax_steps=args.relax_steps,
            ),
            device=choose_device(cpu=args.cpu),
        ),
        bars,
    )
    deliver(args, found.study())
    return 0 if found.accepted else 1
