"""``fairchem-kd cka``: how similar the layers of teacher and student are, before and after."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.commands.output import add_output_arguments, as_text, check_output, deliver
from fairchem_kd.errors import UserError

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
        help="structures, evenly spread over an LMDB, the first of another file; 0: all (500)",
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
    from fairchem_kd.analysis.cka import study as cka
    from fairchem_kd.analysis.cka import tables as shown
    from fairchem_kd.analysis.cka.layers import distilled_pairs, layers_of
    from fairchem_kd.analysis.subjects.runs import find_checkpoint, load_model, read_model
    from fairchem_kd.analysis.subjects.structures import data_of, open_structures
    from fairchem_kd.machine import choose_device

    files = {cka.STUDENT: read_model(args.student, trust=args.trust)}
    own_teacher = files[cka.STUDENT].teacher
    teacher = args.teacher or own_teacher
    if teacher is None:
        raise UserError(
            f"{files[cka.STUDENT].path} was not distilled from a teacher: name one with --teacher."
        )
    files[cka.TEACHER] = read_model(teacher, trust=args.trust)
    if args.before is not None:
        files[cka.BEFORE] = read_model(args.before, trust=args.trust)
    is_own = own_teacher is not None and find_checkpoint(Path(teacher)) == Path(own_teacher)
    marks = distilled_pairs(files[cka.STUDENT]) if is_own else []
    source = args.data or data_of(files[cka.STUDENT])
    device = choose_device(cpu=args.cpu)
    models = {role: load_model(file, device) for role, file in files.items()}
    layers = {
        cka.TEACHER: layers_of(models[cka.TEACHER].model, args.teacher_layers),
        cka.STUDENT: layers_of(models[cka.STUDENT].model, args.student_layers),
    }
    if args.pair:
        marks = [_pair(text, models[cka.STUDENT].model) for text in args.pair]
    with open_structures(source, limit=args.samples or None) as structures:
        found = cka.study(
            models,
            structures,
            layers,
            names=_names(files),
            marks=marks,
            distilled=not args.pair,
            batch_size=args.batch_size,
            progress=True,
        )
    deliver(
        args,
        text=lambda: as_text(shown.tables(found)),
        content=lambda: shown.as_dict(found),
        write=partial(shown.write, found),
    )
    return 0


def _names(files: dict[str, Any]) -> dict[str, str]:
    """What each model is called; its role goes with names that are not told apart."""
    names = {role: file.identifier for role, file in files.items()}
    if len(set(names.values())) < len(names):
        names = {role: f"{name} ({role})" for role, name in names.items()}
    return names


def _pair(text: str, student: Any) -> Any:
    """The mark that ``STUDENT:TEACHER`` names; its form is that of the student's layer."""
    from fairchem_kd.analysis.cka.layers import Form, Mark
    from fairchem_kd.features import available_features
    from fairchem_kd.features.address import parse_address

    ours, separator, theirs = text.partition(":")
    if not separator or not ours or not theirs:
        raise UserError(f"--pair '{text}' does not read STUDENT:TEACHER, for example node:edge@2.")
    specs = available_features(student)
    first = parse_address(ours)[0]
    form: Form = "vector" if first in specs and specs[first].kind == "vector" else "node"
    return Mark(text, form, ours, theirs)
