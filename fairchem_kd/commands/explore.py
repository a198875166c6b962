"""``fairchem-kd explore``: new structures out of given ones, as a data set to distil on."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.calculators.options import add_calculator_arguments, factory_of, parse_part
from fairchem_kd.calculators.parts import run_parts
from fairchem_kd.commands.arguments import at_least, words_of
from fairchem_kd.commands.explore_options import (
    CALCULATOR_BATCH,
    MODEL_BATCH,
    MODES,
    OF_MODES,
    add_limit_arguments,
    add_making_arguments,
    check_dynamics,
    settings_of,
)
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.explore.exploration import Plan
    from fairchem_kd.explore.potentials import Potential
    from fairchem_kd.explore.storing import Noting

_CHILD = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
EPILOG = """\
SOURCE is the folder of a data set (its split train, or --splits) or of a split, or any file that
ASE reads. A new frame is in the split, and of the trajectory, of the structure that it came of.

  fairchem-kd explore data/my --out data/rattled            displaced copies; needs no teacher
  fairchem-kd explore data/my --out data/relaxed --mode relax --teacher teacher.pt
                                           rattle, go down the teacher's forces, repeat
  fairchem-kd explore data/my --out data/md --mode md --teacher teacher.pt --temperature 300 1000
                                           the teacher's own dynamics, heated on the way
  fairchem-kd explore data/my --out data/student --mode student --student student.pt \\
      --teacher teacher.pt                 where the dynamics of the student leave its teacher

It can be stopped at any moment, and goes on where it was when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd explore``."""
    parser.description = "Make new structures out of given ones, as a data set (LMDB) to distil on."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="see below")
    parser.add_argument("--out", type=Path, required=True, metavar="DATA", help="its folder")
    parser.add_argument("--mode", choices=MODES, default="rattle", help="(default: %(default)s)")
    parser.add_argument(
        "--splits", nargs="+", metavar="NAME", help="of a data set with several (train)"
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="so many structures of a source at most"
    )
    parser.add_argument(
        "--frames", type=at_least(1), metavar="N",
        help="keep so many of a split at most, evenly spread over what was found",
    )  # fmt: skip
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(0)")
    add_making_arguments(parser)
    add_limit_arguments(parser)
    _add_teachers(parser)
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N",
        help="structures that are worked on together: a checkpoint is asked about all of them at "
        f"once ({MODEL_BATCH}; with a calculator {CALCULATOR_BATCH})",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=at_least(1), default=1, metavar="N", help="processes here (1)"
    )
    parser.add_argument(
        "--part", metavar="I/N",
        help="do the I-th of N parts only; the same command without it puts them together",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")
    parser.add_argument("--force", action="store_true", help="replace DATA if it is there")


def _add_teachers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher and student")
    group.add_argument("--teacher", type=Path, metavar="FILE", help="the teacher's checkpoint")
    group.add_argument("--student", type=Path, metavar="FILE", help="the student's, or its run")
    add_calculator_arguments(group, required=False)
    group.add_argument(
        "--store", metavar="STORE",
        help="where the teacher's answers are kept: auto (that of trainings here; the default with "
        "--teacher), off, or a folder",
    )  # fmt: skip
    group.add_argument(
        "--features", nargs="+", default=[], metavar="ADDRESS",
        help="features to keep there too, as of `fairchem-kd teach`",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Explore, and print what was found and how a config names it.

    Raises:
        UserError: options, structures or models that will not do.
    """
    from fairchem_kd.commands.data_convert import snippet, summary
    from fairchem_kd.explore.exploration import explore, explore_part

    _check(args)
    part = parse_part(args.part)
    plan = _plan(args, look=part is None)
    if part is not None:
        explore_part(plan, args.out, part)
        return 0
    start = time.monotonic()
    noting = _noting(args, plan)
    card = explore(
        plan,
        args.out,
        force=args.force,
        processes=args.processes,
        run_parts=lambda number: run_parts([sys.executable, "-c", _CHILD, *_words(args)], number),
        keep=None if noting is None else partial(noting.keep, args.out),
    )
    took = time.monotonic() - start
    kept = card["exploration"]["kept"]
    print(f"{args.out}: {kept} frames, {took:.0f} s; details in {args.out / 'card.json'}")
    print(summary(card))
    print("\n".join(_told(card)))
    if card["normalizer"]:
        print(snippet(card, args.out))
    _fill_store(args, noting, card)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: naming them.
    """
    for name, modes in OF_MODES.items():
        if getattr(args, name) is not None and args.mode not in modes:
            raise UserError(
                f"--{name.replace('_', '-')} is of --mode {' and '.join(modes)}, and this is "
                f"{args.mode}: leave it out, or give another mode."
            )
    if args.teacher is not None and args.calculator is not None:
        raise UserError("--teacher and --calculator are two teachers; give one of them.")
    factory_of(args)  # refuses what goes with a calculator alone
    if args.mode != "rattle" and args.teacher is None and args.calculator is None:
        raise UserError(
            f"--mode {args.mode} needs a teacher: --teacher FILE or --calculator MODULE:FACTORY."
        )
    if (args.student is not None) != (args.mode == "student"):
        raise UserError("--student FILE and --mode student go together: give both, or neither.")
    check_dynamics(args, args.mode)
    if args.part is not None and (args.processes > 1 or args.force):
        raise UserError("--part goes with neither --processes nor --force.")
    _check_store(args)


def _check_store(args: argparse.Namespace) -> None:
    given = (args.store or "").strip().lower()
    if args.store is not None and not given:
        raise UserError("--store is empty: give auto, off or a folder.")
    if args.teacher is None and args.calculator is None and (args.store or args.features):
        raise UserError("--store and --features keep what a teacher says, and none is given.")
    if args.calculator is not None and (given == "auto" or (args.features and not args.store)):
        raise UserError("With --calculator, --store must name the folder of a store.")
    if given == "off" and args.features:
        raise UserError("--features are kept in a store, and --store is off: leave one out.")


def _plan(args: argparse.Namespace, *, look: bool) -> Plan:
    """What the options say, models loaded.

    Args:
        args: the options.
        look: look at a calculator's forces first.
    """
    import logging

    from fairchem_kd.explore.exploration import Plan
    from fairchem_kd.explore.starts import Source, find_sources

    logging.getLogger().setLevel(logging.INFO)
    sources = find_sources(args.sources, args.splits)
    teacher, told = _teacher(args, sources[0] if look else None)
    student = None
    if args.student is not None:
        from fairchem_kd.explore.potentials import ModelPotential, told_of

        student = ModelPotential(args.student, cpu=args.cpu, trust=args.trust)
        told["student"] = told_of(args.student)
    apart = [Source(path, path.name) for path in args.apart_from]
    return Plan(sources, settings_of(args, args.mode), teacher, student, args.limit, told, apart)


def _teacher(args: argparse.Namespace, looked_at: Any) -> tuple[Potential | None, dict[str, Any]]:
    """The teacher, and what it is known by; a calculator's forces are looked at on a source."""
    from fairchem_kd.explore.potentials import (
        PROBED,
        CalculatorPotential,
        ModelPotential,
        probe,
        told_of,
    )
    from fairchem_kd.explore.starts import read_starts

    if args.teacher is not None:
        model = ModelPotential(args.teacher, cpu=args.cpu, trust=args.trust)
        return model, {"teacher": told_of(args.teacher)}
    if args.calculator is None:
        return None, {}
    from fairchem_kd.calculators.given import calculator_of

    calculator = calculator_of(args)
    if looked_at is not None:
        starts = read_starts(looked_at, PROBED)
        for line in probe(calculator, [start.atoms() for start in starts]):
            print(line, flush=True)
    factory = calculator.factory
    return CalculatorPotential(calculator), {"teacher": [factory.name, factory.digest]}


def _told(card: dict[str, Any]) -> list[str]:
    """How it went, and how a config names what was found."""
    told = card["exploration"]
    lines = ["kept: " + ", ".join(f"{count} {kind}" for kind, count in told["kinds"].items())]
    if told["left_out"]:
        left = ", ".join(f"{count} {reason}" for reason, count in told["left_out"].items())
        lines.append(f"left out: {left}")
    if "window" in told:
        low, high = told["window"]
        lines.append(
            f"window: {low:g} to {high:g} eV/Å; of {told['looked_at']} frames of the student's "
            f"dynamics {told['inside']} are inside, {told['below']} below, {told['beyond']} "
            f"beyond; {told['crashes']} crashes"
        )
    return lines


def _store(args: argparse.Namespace) -> str:
    """Where the teacher's answers are kept: auto, off or a folder."""
    return (args.store or ("auto" if args.teacher is not None else "off")).strip()


def _noting(args: argparse.Namespace, plan: Plan) -> Noting | None:
    """What puts a calculator's answers into a store while the data set is made."""
    from fairchem_kd.explore.potentials import CalculatorPotential
    from fairchem_kd.explore.storing import Noting

    store = _store(args)
    if store.lower() == "off" or not isinstance(plan.teacher, CalculatorPotential):
        return None
    return Noting(plan.teacher.calculator, Path(store), retry=args.retry)


def _fill_store(args: argparse.Namespace, noting: Noting | None, card: dict[str, Any]) -> None:
    """Keep what the teacher says of the frames, as far as it is not kept yet, for trainings."""
    from fairchem_kd.explore.starts import Source, is_held_out
    from fairchem_kd.explore.storing import fill_from_model, splits_of

    store = _store(args)
    splits = splits_of(args.out, card)
    names = ", ".join(str(path) for path in splits)
    to_learn = [path for path in splits if not is_held_out(Source(path, path.name))]
    if to_learn:
        print(f"as task.distillation.unlabelled: {{dataset: {{format: lmdb, src: {to_learn[0]}}}}}")
    else:
        print(f"not to be trained on: {names}, of structures for validation or tests")
    if store.lower() == "off" or (args.teacher is None and noting is None):
        return
    if noting is not None:
        kept = noting.store
        if not noting.has(splits):  # the data set was there, or its store is another one
            noting.fill(splits)
    else:
        kept = fill_from_model(
            splits, args.teacher, store, args.features, cpu=args.cpu, trust=args.trust
        )
    print(f"what the teacher says of {names} is in {kept}")


def _words(args: argparse.Namespace) -> list[str]:
    """The command that does the same in one process, to be given its part."""
    return [
        "explore",
        *map(str, args.sources),
        *words_of(
            args,
            *("out", "mode", "limit", "frames", "seed", "min_distance", "max_gap", "max_force"),
            *("alike", "teacher", "student", "calculator", "calculator_args", "teacher_name"),
            *("store", "batch", *OF_MODES, "splits", "features", "apart_from"),
            *("cpu", "trust", "retry"),
        ),
    ]
