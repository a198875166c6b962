"""``fairchem-kd data pool SPLIT ... DEST``: several splits as one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairchem_kd.errors import UserError

HELP = "put several splits together as one, without copying them"

DESCRIPTION = """
Put several splits (folders of LMDBs) together as one, in their order: structures that were explored
beside those that there were. Files are linked, not copied, where the file system can, so that
the splits may be removed later. Labels of two methods have two zeros: take a pool with both for
unlabelled structures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd data pool``."""
    parser.add_argument(
        "splits", nargs="+", type=Path, metavar="SPLIT", help="folders of splits, or LMDBs"
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder of the split to write")


def run(args: argparse.Namespace) -> int:
    """Make the pool, and print what is in it and how a config names it.

    Raises:
        UserError: DEST is there, or a split cannot be read or is given twice.
    """
    from fairchem_kd.analysis.subjects.structures import open_structures
    from fairchem_kd.data.pool import make_pool

    if args.dest.exists() or args.dest.is_symlink():
        raise UserError(f"DEST {args.dest} is there already: remove it, or name another folder.")
    _check(args.splits)
    counts = []
    for split in args.splits:
        with open_structures({"format": "lmdb", "src": str(split)}) as opened:
            next(opened.samples())
            counts.append(opened.count or 0)
    try:
        args.dest.parent.mkdir(parents=True, exist_ok=True)
        make_pool(args.dest, args.splits)
    except OSError as error:
        raise UserError(f"DEST {args.dest} cannot be written: {error}.") from error
    told = [f"{number} of {split}" for number, split in zip(counts, args.splits, strict=True)]
    print(f"{args.dest}: {sum(counts)} structures ({', '.join(told)})")
    print(
        "task:\n  distillation:\n    unlabelled:\n"
        f"      dataset: {{format: lmdb, src: {args.dest}}}"
    )
    return 0


def _check(splits: Sequence[Path]) -> None:
    """Refuse splits that are not there, have no LMDB, or are given twice.

    Raises:
        UserError: naming the split.
    """
    seen = set()
    for split in splits:
        if split.resolve() in seen:
            raise UserError(f"{split} is given twice: its structures would count twice.")
        seen.add(split.resolve())
        if not split.exists():
            raise UserError(f"{split} does not exist in {Path.cwd()}: name the folder of a split.")
        if split.is_dir() and not any(split.glob("*.lmdb")):
            inside = sorted(one.name for one in split.iterdir() if any(one.glob("*.lmdb")))
            named = (
                f"one of its splits ({', '.join(inside)})" if inside else "the folder of a split"
            )
            raise UserError(f"{split} has no LMDB: name {named}.")
