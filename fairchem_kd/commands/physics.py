"""``fairchem-kd physics``: do teacher, baseline and distilled student behave as potentials?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.commands.arguments import at_least, more_than
from fairchem_kd.commands.output import add_output_arguments, as_text, check_output, deliver
from fairchem_kd.errors import UserError

EPILOG = """\
A RUN is the folder of a run, a checkpoint, or LABEL=RUN. Runs of one LABEL, and runs that differ by
the seed alone, count as seeds of one model. Every model goes through stock fairchem's
OCPCalculator, from the same structures, and so does the teacher that the runs were distilled from.
On data of ours the labels' method (EMT or GFN2-xTB) is one more row, and what the others are held
to.

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
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="(default: the runs' own)")
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
    parser.add_argument(
        "--method",
        choices=("auto", "emt", "xtb", "none"),
        default="auto",
        help="of the labels (default: what the data set's card says)",
    )
    parser.add_argument(
        "--md-steps", type=more_than(0), default=200, metavar="N", help="of MD (200)"
    )
    parser.add_argument(
        "--time-step", type=more_than(0.0), default=0.5, metavar="FS", help="of MD (0.5)"
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0.0),
        default=300.0,
        metavar="K",
        help="of the velocities (300)",
    )
    parser.add_argument(
        "--fmax", type=more_than(0.0), default=0.05, help="of relaxations, eV/Å (0.05)"
    )
    parser.add_argument(
        "--relax-steps", type=more_than(0), default=100, metavar="N", help="of a relaxation (100)"
    )
    add_output_arguments(parser, "physics.md, physics.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        UserError: models, structures or a method that will not do.
    """
    check_output(args)
    from fairchem_kd.analysis.physics import study as physics_study
    from fairchem_kd.analysis.physics import tables as shown
    from fairchem_kd.analysis.subjects.calculators import atoms_of, make_calculator
    from fairchem_kd.analysis.subjects.structures import data_of, open_structures
    from fairchem_kd.machine import choose_device

    files = _models(args)
    source = args.data or data_of(list(files.values())[-1][0])
    with open_structures(source, limit=args.structures) as structures:
        atoms = atoms_of(structures)
        data = structures.path
    cpu = choose_device(cpu=args.cpu).type == "cpu"
    found = physics_study.study_physics(
        {label: [make_calculator(f, cpu=cpu) for f in seeds] for label, seeds in files.items()},
        atoms,
        method=_method(args.method, source),
        data=data,
        settings=physics_study.Settings(
            md_steps=args.md_steps,
            time_step=args.time_step,
            temperature=args.temperature,
            fmax=args.fmax,
            relax_steps=args.relax_steps,
        ),
        progress=True,
    )
    deliver(
        args,
        text=lambda: as_text(shown.tables(found)),
        content=lambda: shown.as_dict(found),
        write=partial(shown.write, found),
    )
    return 0


def _models(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The files of every seed by label, the teacher first.

    Raises:
        UserError: one file given twice, or a model without forces.
    """
    from fairchem_kd.analysis.compare.comparison import group_by_recipe
    from fairchem_kd.analysis.subjects.runs import read_model, read_named

    named = read_named(args.runs, trust=args.trust)
    teacher = args.teacher or next((file.teacher for _, file in named if file.teacher), None)
    groups = group_by_recipe(named)
    files: dict[str, list[Any]] = {}
    if teacher is not None:
        path = read_model(teacher, trust=args.trust)
        own = [g for g in groups if any(f.path.resolve() == path.path.resolve() for f in g.files)]
        groups = [group for group in groups if group not in own]
        label = own[0].label if own else "teacher"
        if any(group.label == label for group in groups):
            label = f"teacher {path.identifier}"
        files[label] = [path]
    files |= {group.label: list(group.files) for group in groups}
    for name, seeds in files.items():
        for file in seeds:
            if "forces" not in _outputs(file.config):
                raise UserError(
                    f"{file.path} ('{name}') predicts no forces, and dynamics and relaxations need "
                    "them; leave it out."
                )
    return files


def _outputs(config: Mapping[str, Any]) -> Sequence[str]:
    return list(config.get("outputs") or ("energy", "forces"))


def _method(asked: str, source: Any) -> str | None:
    from fairchem_kd.analysis.subjects.reference_method import METHODS, method_of

    if asked != "auto":
        return METHODS.get(asked)
    return method_of(source if isinstance(source, Mapping) else {"src": str(source)})
