"""``fairchem-kd physics``: do teacher, baseline and distilled student behave as potentials?"""

from __future__ import annotations

import argparse
from pathlib import Path

from fairchem_kd.commands.arguments import add_physics_arguments, more_than
from fairchem_kd.commands.output import add_output_arguments, check_output, deliver

EPILOG = """\
A RUN is the folder of a run, a checkpoint, or LABEL=RUN. Runs of one LABEL, and runs that differ by
the seed alone, count as seeds of one model. Every model starts from the same structures, through
fairchem_kd.StudentCalculator, and so does the teacher that the runs were distilled from. Dynamics
are of all structures at once. On data of ours the labels' method (EMT or GFN2-xTB) is one more row,
and what the others are held to.

  fairchem-kd physics checkpoints/*-plain-s? checkpoints/*-e2n-s? --out physics
  fairchem-kd physics model.pt --data structures.traj --method none --structures 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd physics``."""
    parser.description = (
        "NVE energy drift and stability, relaxations, forces against finite differences of the "
        "energy and bond scans of several models, side by side."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument(
        "--teacher", type=Path, metavar="RUN", help="(default: the runs' own); none for no teacher"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="structures to start from (default: the runs' test set)"
    )
    parser.add_argument(
        "--structures",
        type=more_than(0),
        default=5,
        metavar="N",
        help="how many, evenly spread (5)",
    )
    add_physics_arguments(parser)
    add_output_arguments(parser, "physics.md, physics.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        UserError: models, structures or a method that will not do.
    """
    check_output(args)
    from fairchem_kd.analysis.physics.runs import study
    from fairchem_kd.analysis.physics.study import Settings

    found = study(
        args.runs,
        teacher=args.teacher,
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
        cpu=args.cpu,
        trust=args.trust,
    )
    deliver(args, found)
    return 0
