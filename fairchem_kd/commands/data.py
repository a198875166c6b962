"""``fairchem-kd data``: make a data set now, with sizes of one's own; convert one's files; pool."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from fairchem_kd.commands import data_convert as cli_convert
from fairchem_kd.commands import data_pool as cli_pool
from fairchem_kd.commands.arguments import at_least

_HELP = {
    "slabs": "adsorbates on metal slabs, EMT labels (OC20-like)",
    "collisions": "collisions of small molecules, GFN2-xTB labels (COLL-like); needs tblite",
}
#: Frames of each split by default, as the recipes have them, which import ASE; a test compares.
SIZES = {
    "slabs": {"train": 3000, "val": 500, "test": 500, "test_ood": 500},
    "collisions": {"train": 4000, "val": 500, "test": 1000, "test_ood": 500},
}
#: The fewest frames of train, as the recipes have it too; of another split it is one.
LEAST_TRAIN = {"slabs": 20, "collisions": 24}


def _flag(split: str) -> str:
    return "--" + split.removeprefix("test_")


def _add_recipe(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument(
        "--dest", type=Path, default=Path("data") / recipe, metavar="FOLDER",
        help="folder of the data set (default: %(default)s)",
    )  # fmt: skip
    for split, size in SIZES[recipe].items():
        least = LEAST_TRAIN[recipe] if split == "train" else 1
        parser.add_argument(
            _flag(split), dest=split, type=at_least(least), default=size, metavar="N",
            help=f"frames of {split} (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--references", metavar="FOLDER",
        help="a data set of this recipe whose elements' energies are taken, so that both have one "
        "zero (default: fitted to train)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=at_least(1), metavar="N",
        help="worker processes; the data do not depend on it (default: the machine's cores, at "
        "most 16)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="replace the data set if it is already there"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for every recipe, `convert` and `pool`."""
    subparsers = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name in SIZES:
        _add_recipe(
            subparsers.add_parser(name, help=_HELP[name], description=f"Make {_HELP[name]}."), name
        )
    cli_convert.add_arguments(
        subparsers.add_parser("convert", help=cli_convert.HELP, description=cli_convert.DESCRIPTION)
    )
    cli_pool.add_arguments(
        subparsers.add_parser("pool", help=cli_pool.HELP, description=cli_pool.DESCRIPTION)
    )


def run(args: argparse.Namespace) -> int:
    """Make the data set and print what is in it; 0 is returned, a UserError raised otherwise."""
    if args.recipe == "convert":
        return cli_convert.run(args)
    if args.recipe == "pool":
        return cli_pool.run(args)
    from fairchem_kd.data.create import create
    from fairchem_kd.data.recipes.registry import RECIPES, parse_options

    recipe = RECIPES[args.recipe]
    given: dict[str, Any] = {split: getattr(args, split) for split in recipe.sizes}
    given |= {"seed": args.seed, "references": args.references}
    options = parse_options({"recipe": recipe.name, **given}, "--")
    there = args.dest.exists() and not args.force
    start = time.monotonic()
    card = create(options, args.dest, args.processes, args.force)
    took = "was there already" if there else f"made in {time.monotonic() - start:.0f} s"
    print(f"{args.dest}: {took}; details in {args.dest / 'card.json'}")
    print(summary(card))
    if there:
        print("Nothing was made; --force replaces the data set.", file=sys.stderr)
    return 0


def summary(card: dict[str, Any]) -> str:
    """A table of a card's splits, and the values for a config's normalizer."""
    from ase.data import chemical_symbols

    header = (
        f"{'split':<12}{'frames':>8}{'traj.':>8}{'skipped':>9}{'atoms':>7}"
        f"{'E std':>9}{'F rms':>9}{'F max':>9}"
    )
    lines = [header]
    for name, split in card["splits"].items():
        skipped = sum(split["skipped_frames"].values())
        lines.append(
            f"{name:<12}{split['frames']:>8}{split['trajectories']:>8}{skipped:>9}"
            f"{split['natoms']['mean']:>7.1f}{split['energy']['std']:>9.3f}"
            f"{split['force_rms_free']:>9.3f}{split['force_norm_max']['max']:>9.2f}"
        )
    for name, part in card["quarters"].items():
        lines.append(f"{name:<12}{part['frames']:>8}{part['trajectories']:>8}")
    energy, forces = card["normalizer"]["energy"], card["normalizer"]["forces"]
    lines += [
        "eV and eV/Å, forces of free atoms; E is the total energy less its elements' references",
        f"elements: {' '.join(chemical_symbols[z] for z in card['elements'])}",
        f"normalizer: energy {{mean: {energy['mean']:.6f}, rmsd: {energy['rmsd']:.6f}}}, "
        f"forces {{mean: 0.0, rmsd: {forces['rmsd']:.6f}}}",
    ]
    return "\n".join(lines)
