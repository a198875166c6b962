"""``fairchem-kd explore``: new structures out of given ones, as a data set to distil on."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.calculators.options import add_calculator_arguments, factory_of, parse_part
from fairchem_kd.calculators.parts import run_parts
from fairchem_kd.commands.arguments import at_least, more_than
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.explore.exploration import Plan
    from fairchem_kd.explore.potentials import Potential

#: As in :mod:`fairchem_kd.explore.settings`, which imports ASE; a test compares.
MODES = ("rattle", "relax", "md", "student")
_OF_MODES = {
    "std": ("rattle", "relax"),
    "copies": ("rattle", "relax"),
    "relax_steps": ("relax",),
    "temperature": ("relax", "md", "student"),
    "steps": ("md", "student"),
    "every": ("md", "student"),
    "time_step": ("md", "student"),
    "friction": ("md", "student"),
    "window": ("student",),
    "before_crash": ("student",),
}
_CHILD = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
_MODEL_BATCH, _CALCULATOR_BATCH = 16, 1
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
    _add_making(parser)
    add_limit_arguments(parser)
    _add_teachers(parser)
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N",
        help="structures that are worked on together: a checkpoint is asked about all of them at "
        f"once ({_MODEL_BATCH}; with a calculator {_CALCULATOR_BATCH})",
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


def _add_making(parser: argparse.ArgumentParser) -> None:
    """How structures are made; each option goes with some of the modes."""
    group = parser.add_argument_group("how structures are made")
    group.add_argument(
        "--std", nargs="+", type=more_than(0.0), metavar="Å",
        help="rattle, relax: standard deviations of the noise, in turn (0.03 0.06 0.12)",
    )  # fmt: skip
    group.add_argument(
        "--copies", type=at_least(1), metavar="N",
        help="rattle: copies of a structure; relax: how often it is rattled and relaxed (4)",
    )  # fmt: skip
    group.add_argument(
        "--relax-steps", type=at_least(0), metavar="N",
        help="relax: steps down along the forces, at most; how many is drawn (8)",
    )  # fmt: skip
    add_dynamics_arguments(group)


def add_dynamics_arguments(group: argparse._ActionsContainer) -> None:
    """How dynamics run, and what is kept of a student's."""
    group.add_argument(
        "--temperature", nargs="+", type=more_than(0.0), metavar="K",
        help="relax: by which energies are accepted; md, student: of the dynamics, or at their "
        "beginning and end (300)",
    )  # fmt: skip
    group.add_argument("--steps", type=at_least(1), metavar="N", help="md, student (200)")
    group.add_argument(
        "--every", type=at_least(1), metavar="N", help="md, student: steps between two frames (20)"
    )
    group.add_argument("--time-step", type=more_than(0.0), metavar="FS", help="md, student (0.5)")
    group.add_argument(
        "--friction", type=at_least(0.0), metavar="PER_FS",
        help="md, student: of the Langevin thermostat (0.02)",
    )  # fmt: skip
    group.add_argument(
        "--window", nargs=2, type=at_least(0.0), metavar=("LOW", "HIGH"),
        help="student: frames are kept where the largest difference of its forces from the "
        "teacher's is within, eV/Å (from that of 9 in 10 of the given structures to ten times it)",
    )  # fmt: skip
    group.add_argument(
        "--before-crash", type=at_least(0), metavar="N",
        help="student: frames that are kept of the last ones before its dynamics crash (2)",
    )  # fmt: skip


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """What is left out of what was found."""
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--min-distance", type=at_least(0.0), default=0.55, metavar="SHARE",
        help="atoms closer than that share of the sum of their covalent radii (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-gap", type=more_than(0.0), default=5.0, metavar="Å",
        help="an atom or a fragment that far from all else, unless it was before (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-force", type=more_than(0.0), default=50.0, metavar="EV_PER_Å",
        help="larger forces on an atom (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--apart-from", nargs="+", type=Path, default=[], metavar="DATA",
        help="splits or files with whose structures nothing may be alike, beside those for "
        "validation and tests that lie beside SOURCE",
    )  # fmt: skip
    group.add_argument(
        "--alike", type=at_least(0.0), default=0.01, metavar="Å",
        help="structures whose distances are those of another one, of the source, of what was "
        "found, or of a split for tests beside it, but for that (%(default)s); 0: none",
    )  # fmt: skip


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
    card = explore(
        plan,
        args.out,
        force=args.force,
        processes=args.processes,
        run_parts=lambda number: run_parts([sys.executable, "-c", _CHILD, *_words(args)], number),
    )
    took = time.monotonic() - start
    kept = card["exploration"]["kept"]
    print(f"{args.out}: {kept} frames, {took:.0f} s; details in {args.out / 'card.json'}")
    print(summary(card))
    print("\n".join(_told(card)))
    if card["normalizer"]:
        print(snippet(card, args.out))
    _fill_store(args, plan, card)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: naming them.
    """
    for name, modes in _OF_MODES.items():
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


def check_dynamics(args: argparse.Namespace, mode: str) -> None:
    """Refuse dynamics that make no sense, and splits to stay apart from that are not there.

    Raises:
        UserError: naming the option.
    """
    if args.temperature is not None and len(args.temperature) > (1 if mode == "relax" else 2):
        raise UserError("--temperature takes one value, or of dynamics its beginning and its end.")
    if args.window is not None and not args.window[0] < args.window[1]:
        raise UserError(
            f"--window {args.window[0]:g} {args.window[1]:g} is empty: give the smaller value "
            "first."
        )
    steps, every = args.steps or 200, args.every or 20
    if mode in ("md", "student") and every > steps:
        raise UserError(f"--every {every} is more than --steps {steps}: no frame would be taken.")
    for path in args.apart_from:
        if not path.exists():
            raise UserError(f"--apart-from {path} does not exist; name a split or a file.")


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
    from fairchem_kd.explore.guards import Limits
    from fairchem_kd.explore.settings import Settings
    from fairchem_kd.explore.starts import Source, find_sources

    logging.getLogger().setLevel(logging.INFO)
    sources = find_sources(args.sources, args.splits)
    teacher, told = _teacher(args, sources[0] if look else None)
    student = None
    if args.student is not None:
        from fairchem_kd.explore.potentials import ModelPotential

        student = ModelPotential(args.student, cpu=args.cpu, trust=args.trust)
        told["student"] = told_of_file(args.student)
    batch = args.batch or (_CALCULATOR_BATCH if args.calculator is not None else _MODEL_BATCH)
    settings = Settings(
        mode=args.mode,
        seed=args.seed,
        limits=Limits(args.min_distance, args.max_gap, args.max_force),
        alike=args.alike,
        most=args.frames,
        batch=batch,
        **given_dynamics(args),
    )
    apart = [Source(path, path.name) for path in args.apart_from]
    return Plan(sources, settings, teacher, student, args.limit, told, apart)


def given_dynamics(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of how structures are made that were given, as settings have them."""
    from fairchem_kd.explore.settings import Window

    named: dict[str, Any] = {name: getattr(args, name, None) for name in _OF_MODES}
    given = {name: value for name, value in named.items() if value is not None}
    if "std" in given:
        given["std"] = tuple(given["std"])
    if "temperature" in given:
        given["temperature"] = (args.temperature[0], args.temperature[-1])
    if "window" in given:
        given["window"] = Window(*args.window)
    return given


def _teacher(args: argparse.Namespace, looked_at: Any) -> tuple[Potential | None, dict[str, Any]]:
    """The teacher, and what it is known by; a calculator's forces are looked at on a source."""
    from fairchem_kd.explore.potentials import (
        PROBED,
        CalculatorPotential,
        ModelPotential,
        probe,
    )
    from fairchem_kd.explore.starts import read_starts

    if args.teacher is not None:
        model = ModelPotential(args.teacher, cpu=args.cpu, trust=args.trust)
        return model, {"teacher": told_of_file(args.teacher)}
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


def told_of_file(path: Path) -> list[Any]:
    """What a file is known by: where, how large, and when it was written."""
    from fairchem_kd.analysis.subjects.runs import find_checkpoint

    if not path.exists():
        raise UserError(f"{path} does not exist in {Path.cwd()}; name a checkpoint.")
    path = find_checkpoint(path)
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


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


def _fill_store(args: argparse.Namespace, plan: Plan, card: dict[str, Any]) -> None:
    """Keep what the teacher says of the frames, for trainings."""
    from fairchem_kd.explore.potentials import CalculatorPotential
    from fairchem_kd.explore.storing import fill_from_calculator, fill_from_model, splits_of

    store = (args.store or ("auto" if args.teacher is not None else "off")).strip()
    splits = splits_of(args.out, card)
    names = ", ".join(str(path) for path in splits)
    print(f"as task.distillation.unlabelled: {{dataset: {{format: lmdb, src: {splits[0]}}}}}")
    if store.lower() == "off" or plan.teacher is None:
        return
    if isinstance(plan.teacher, CalculatorPotential):
        calculator = plan.teacher.calculator
        kept = fill_from_calculator(splits, calculator, Path(store), retry=args.retry)
    else:
        kept = fill_from_model(
            splits, args.teacher, store, args.features, cpu=args.cpu, trust=args.trust
        )
    print(f"what the teacher says of {names} is in {kept}")


def _words(args: argparse.Namespace) -> list[str]:
    """The command that does the same in one process, to be given its part."""
    words = ["explore", *map(str, args.sources)]
    for name in (
        *("out", "mode", "limit", "frames", "seed", "min_distance", "max_gap", "max_force"),
        *("alike", "teacher", "student", "calculator", "calculator_args", "teacher_name"),
        *("store", "batch"),
        *_OF_MODES,
        *("splits", "features", "apart_from"),
    ):
        value = getattr(args, name)
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words + [f"--{name}" for name in ("cpu", "trust", "retry") if getattr(args, name)]
