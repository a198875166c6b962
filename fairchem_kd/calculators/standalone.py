"""The command of the file that ``fairchem-kd teach --writer`` writes.

It fills a store in an environment that has a calculator, numpy and ASE, and neither fairchem-kd nor
fairchem-core nor torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from fairchem_kd.calculators.ase_files import AseFiles
from fairchem_kd.calculators.filling import CalculatorFilling, prepare
from fairchem_kd.calculators.given import calculator_of
from fairchem_kd.calculators.options import add_calculator_arguments, parse_part
from fairchem_kd.calculators.parts import run_parts
from fairchem_kd.calculators.structures_file import StructuresFile
from fairchem_kd.errors import UserError, of_disk, report


def make_standalone_parser() -> argparse.ArgumentParser:
    """Its options: those of ``fairchem-kd teach``, as far as they make sense without it."""
    parser = argparse.ArgumentParser(
        description="Keep what an ASE calculator says of structures, for trainings of fairchem-kd."
    )
    parser.add_argument(
        "structures", nargs="+", type=Path, metavar="STRUCTURES",
        help="a file of `fairchem-kd teach CONFIG.yml --structures FILE`, or files that ASE reads",
    )  # fmt: skip
    add_calculator_arguments(parser, required=True)
    parser.add_argument(
        "--features", nargs="+", default=[], metavar="ADDRESS[=KEY]",
        help="features to keep: node=KEY for an array (N, C) of the calculator's results, "
        "vector=KEY for (N, 3, C)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="its folder")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes here (1)")
    parser.add_argument("--part", metavar="I/N", help="do the I-th of N parts only")
    parser.add_argument("--max-gb", type=float, metavar="GB", help="GB that may be written")
    return parser


def standalone(argv: Sequence[str] | None = None) -> int:
    """Fill a store; returns the exit code."""
    args = make_standalone_parser().parse_args(argv)
    try:
        return _fill(args)
    except UserError as error:
        return report(error)
    except OSError as error:
        return report(of_disk(error))
    except KeyboardInterrupt:
        print("\nstopped; what it had kept is whole: start it again", file=sys.stderr)
        return 130


def _fill(args: argparse.Namespace) -> int:
    part = parse_part(args.part)
    if args.processes < 1 or (part is not None and args.processes > 1):
        raise UserError("--processes must be at least 1, and does not go with --part.")
    if args.max_gb is not None and not (math.isfinite(args.max_gb) and args.max_gb > 0):
        raise UserError(f"--max-gb must be more than 0, not {args.max_gb}.")
    source = _source(args.structures)
    calculator = calculator_of(args)
    card, told = prepare(args.out, calculator, source.items())
    if part is None:
        print("\n".join([*told, f"teacher {card.name} ({card.teacher[:16]})"]), flush=True)
    if args.processes > 1:
        _in_processes(sys.argv[1:], args.processes)
    number, parts = part or (0, 1)
    filling = CalculatorFilling(
        args.out,
        calculator,
        limit=math.inf if args.max_gb is None else args.max_gb * 1e9,
        retry=args.retry and args.processes == 1,
        quiet=number > 0,
    )
    summary = filling.fill(source.items(number, parts), -(-len(source) // parts))
    if part is None:
        print(f"{args.out}: {summary}")
    return 0


def _source(paths: Sequence[Path]) -> StructuresFile | AseFiles:
    if any(path.suffix == ".npz" for path in paths):
        if len(paths) > 1:
            raise UserError("Give one file of `fairchem-kd teach --structures` alone.")
        return StructuresFile(paths[0])
    return AseFiles(paths)


def _in_processes(words: Sequence[str], number: int) -> None:
    """The same command in several processes, each with its part.

    Raises:
        UserError: one of them failed.
    """
    kept, skip = [], False
    for word in words:
        if skip or word.startswith("--processes"):
            skip = not skip and word == "--processes"
            continue
        kept.append(word)
    run_parts([sys.executable, sys.argv[0], *kept], number)
