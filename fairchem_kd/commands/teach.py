"""``fairchem-kd teach``: fill a store with what a teacher says; look into it, and verify it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.calculators.options import add_calculator_arguments, factory_of, parse_part
from fairchem_kd.calculators.parts import run_parts
from fairchem_kd.commands.arguments import (
    add_cluster_arguments,
    at_least,
    more_than,
    words_of,
)
from fairchem_kd.commands.teach_calculator import (
    ask,
    store_of,
    verify,
    write_structures,
    write_writer,
)
from fairchem_kd.errors import UserError
from fairchem_kd.machine import FP32, PRECISIONS

if TYPE_CHECKING:
    from fairchem_kd.teachers import LiveTeacher

_CHILD = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
EPILOG = """\
A training with a teacher fills its store by itself. This command does so ahead, or in parallel:

  fairchem-kd teach CONFIG.yml                 all that this training will ask of its teacher
  fairchem-kd teach CONFIG.yml --processes 8   the same, with 8 processes on this machine
  fairchem-kd teach CONFIG.yml --submit --parts 20 --slurm-partition gpu    as a SLURM array
  fairchem-kd teach CONFIG.yml --part 3/20     the third of 20 parts, for a script of your own
  fairchem-kd teach DATA... --teacher FILE     structures: data sets, or files that ASE reads
  fairchem-kd teach CONFIG.yml --calculator ase.calculators.emt:EMT --out STORE
                                               the same of any ASE calculator; and of DATA
  fairchem-kd teach CONFIG.yml --structures FILE.npz    write what would be asked about, and
  fairchem-kd teach --writer FILE.py           what asks about it where numpy and ASE are alone
  fairchem-kd teach info STORE                 what a store holds
  fairchem-kd teach verify STORE               check all of it, and ask the teacher about a sample

It can be stopped at any moment and goes on where it was; several may fill one store side by side.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd teach``."""
    parser.description = "Keep what a teacher says of structures, to be read by every training."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="CONFIG.yml, or DATA, or info or verify and a STORE"
    )
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="the teacher's checkpoint")
    parser.add_argument(
        "--features", nargs="+", default=[], metavar="ADDRESS",
        help="with DATA: features to keep with the outputs, such as node edge vector node@2; "
        "edge features are summed onto their target atoms; of a calculator ADDRESS=KEY, the array "
        "KEY of its results",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="STORE", help="the store's folder (default: that of trainings here)"
    )
    parser.add_argument(
        "--processes", type=at_least(1), default=1, metavar="N", help="processes here (1)"
    )
    parser.add_argument("--part", metavar="I/N", help="do the I-th of N parts only")
    parser.add_argument("--max-gb", type=more_than(0.0), metavar="GB", help="GB it may have (20)")
    parser.add_argument(
        "--samples", type=at_least(1), default=32, metavar="N",
        help="verify: entries that the teacher is asked about again (32)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="in which the teacher computes (fp32, or what the config says)",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")
    anywhere = parser.add_argument_group("any ASE calculator as the teacher")
    add_calculator_arguments(anywhere, required=False)
    anywhere.add_argument(
        "--structures", metavar="FILE.npz",
        help="ask nobody: write the structures that would be asked about to a file",
    )  # fmt: skip
    anywhere.add_argument(
        "--writer", type=Path, metavar="FILE.py",
        help="write the python file that fills a store where numpy, ASE and a calculator are",
    )  # fmt: skip
    cluster = add_cluster_arguments(parser, "submit the parts as one job array")
    cluster.add_argument(
        "--parts", type=at_least(1), default=16, metavar="N", help="jobs of the array (16)"
    )


def run(args: argparse.Namespace) -> int:
    """Fill, show or verify a store; returns the exit code.

    Raises:
        UserError: a config, teacher, data set or store that will not do.
    """
    if args.writer is not None:
        if args.what:
            raise UserError("--writer FILE.py is given alone.")
        return write_writer(args.writer)
    if not args.what:
        raise UserError("fairchem-kd teach needs CONFIG.yml, or DATA, or info or verify and STORE.")
    first, *more = args.what
    if first in ("info", "verify") and not (more == [] and Path(first).exists()):
        if len(more) != 1:
            raise UserError(f"fairchem-kd teach {first} takes one STORE, the folder of a store.")
        return _info(Path(more[0])) if first == "info" else _verify(Path(more[0]), args)
    if args.structures is not None:
        return write_structures(args)
    part = parse_part(args.part)
    if part is not None and (args.processes > 1 or args.submit):
        raise UserError("--part goes with neither --processes nor --submit.")
    _check_teacher(args)
    if args.submit:
        if args.processes > 1:
            raise UserError("--processes and --submit: give one of the two; --parts says how many.")
        return _submit(args)
    is_config = _is_config(args)
    if args.processes > 1:
        run_parts([sys.executable, "-c", _CHILD, *_words(args)], args.processes)
        args.retry = False
    if args.calculator is not None:
        store = ask(args, part)
        return _info(store) if part is None else 0
    if is_config:
        return _for_training(Path(first), args, part)
    return _for_data([Path(path) for path in args.what], args, part or (0, 1))


def _check_teacher(args: argparse.Namespace) -> None:
    """Refuse options of one kind of teacher beside the other."""
    from fairchem_kd.calculators.asking import parse_features

    if factory_of(args) is None:
        return
    others = ("teacher", "precision", "trust")
    for name in others:
        if getattr(args, name):
            raise UserError(f"--{name} is of a checkpoint, and --calculator is another teacher.")
    parse_features(args.features)
    store_of(args)


def _words(args: argparse.Namespace) -> list[str]:
    """The command that does the same in one process, to be given its part."""
    words = ["teach", *args.what]
    named = ("calculator", "calculator_args", "teacher_name")
    words += words_of(args, "teacher", "out", "max_gb", "precision", *named, "features")
    return words + words_of(args, "cpu", "trust", "retry")


def _submit(args: argparse.Namespace) -> int:
    """The parts as jobs of a scheduler; returns 1 where one failed, as far as that is known.

    Raises:
        UserError: what can be seen to be wrong before, or the scheduler refuses the jobs.
    """
    from fairchem_kd.commands.jobs import asked_of
    from fairchem_kd.commands.teach_jobs import Request, submit

    slurm = _check_before(args)
    request = Request(parts=args.parts, parallel=args.array_parallelism, **asked_of(args))
    failed = submit(_words(args), request, slurm, lambda line: print(line, flush=True))
    if failed:
        print(f"{len(failed)} of {args.parts} parts failed; what the others kept is kept")
    return 1 if failed else 0


def _check_before(args: argparse.Namespace) -> dict[str, Any]:
    """Refuse what no job could do; returns the config's ``slurm`` block, where there is one."""
    from fairchem_kd.distillation.config import parse_distillation
    from fairchem_kd.stock.configs import training_config

    for path in [*map(Path, args.what), *([args.teacher] if args.teacher else [])]:
        if not path.exists():
            raise UserError(f"{path} does not exist.")
    if not _is_config(args):
        return {}
    config = training_config(Path(args.what[0]))
    parse_distillation(config.get("task"))
    return config.get("slurm") or {}


def _is_config(args: argparse.Namespace) -> bool:
    """Whether a training's config is given, and not data.

    Raises:
        UserError: a config with more beside it, or data without a teacher.
    """
    first, *more = args.what
    if Path(first).suffix not in (".yml", ".yaml"):
        if args.teacher is None and args.calculator is None:
            raise UserError(
                "fairchem-kd teach DATA needs --teacher FILE, a checkpoint, or --calculator "
                "MODULE:FACTORY."
            )
        return False
    if more or (args.features and args.calculator is None):
        raise UserError("A training's config says what is to be asked: give it alone.")
    return True


def _for_training(path: Path, args: argparse.Namespace, part: tuple[int, int] | None) -> int:
    """Ask for all that a training will ask."""
    import logging

    from fairchem_kd.distillation.teaching import teach_for_training

    logging.getLogger().setLevel(logging.INFO)
    stores = teach_for_training(
        path,
        teacher=args.teacher,
        out=args.out,
        max_gb=args.max_gb,
        precision=args.precision,
        trust=args.trust,
        cpu=args.cpu,
        part=part,
    )
    return max(map(_info, stores)) if part is None else 0


def _for_data(paths: list[Path], args: argparse.Namespace, part: tuple[int, int]) -> int:
    """Ask about data sets and files."""
    import logging
    from contextlib import ExitStack

    from fairchem_kd.analysis.embeddings.extract import feature_tap
    from fairchem_kd.analysis.subjects.structures import open_structures
    from fairchem_kd.distillation.config import TeacherConfig
    from fairchem_kd.distillation.teaching import teach_samples
    from fairchem_kd.teachers.place import AUTO

    logging.getLogger().setLevel(logging.INFO)
    live = _live(args.teacher, args, args.precision or FP32)
    requests = list(feature_tap(live.frozen.model, args.features).specs) if args.features else []
    config = TeacherConfig(str(args.teacher), store=args.out or AUTO, max_gb=args.max_gb or 20.0)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_structures(path)) for path in paths]
        samples = {structures.path: structures.samples for structures in opened}
        store = teach_samples(live, requests, config, samples, part=part)
    return _info(store)


def _live(path: Path, args: argparse.Namespace, precision: str) -> LiveTeacher:
    from fairchem_kd.machine import choose_device
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.teachers import LiveTeacher

    device = choose_device(cpu=args.cpu)
    frozen = Teacher.from_checkpoint(path, trust=args.trust, device=device, where="--teacher")
    return LiveTeacher(frozen, precision)


def _card(store: Path) -> Any:
    from fairchem_kd.store import Card

    card = Card.read(store) if store.exists() else None
    if card is None:
        raise UserError(f"{store} is no store of a teacher's answers; name the folder of one.")
    return card


def _info(store: Path) -> int:
    from fairchem_kd.teachers.contents import contents

    _card(store)
    print(contents(store))
    return 0


def _verify(store: Path, args: argparse.Namespace) -> int:
    from fairchem_kd.teachers.contents import check_records
    from fairchem_kd.teachers.drift import differences, refuse_drift
    from fairchem_kd.teachers.place import check_card
    from fairchem_kd.teachers.stored import StoredTeacher, requests_in

    card = _card(store)
    whole, damaged = check_records(store)
    print(f"{whole} records are whole, {damaged} are damaged or cut off")
    if card.calculator is not None:
        verify(store, card, args.samples)
        return 1 if damaged else 0
    path = args.teacher or Path(card.name)
    if not path.exists():
        raise UserError(
            f"The teacher {path} is not here, so that it cannot be asked; give it with --teacher."
        )
    live = _live(path, args, card.precision)
    check_card(card, live, store, card.features)
    requests, columns = requests_in(store)
    teacher = StoredTeacher(live, store, requests, columns)
    asked, found = differences(teacher, args.samples, live.device, card.dependence)
    print(f"{asked} structures were asked about again; the largest differences:")
    for one in found:
        unit = "eV per atom" if one.column == "output:energy" else "of the root mean square"
        print(f"  {one.column:<28} {one.value:.2e} {unit}")
    refuse_drift(found, store)
    if damaged:
        print("Damaged records are asked about again by the next training that wants them.")
    return 1 if damaged else 0
