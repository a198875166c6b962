"""``fairchem-kd data convert SOURCE ... DEST``: one's own files to a data set for fairchem."""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.errors import UserError
from fairchem_kd.reading import read_json

if TYPE_CHECKING:
    from fairchem_kd.data.convert.assemble import Conversion

#: Those of fairchem_kd.data.convert.labels, which imports ASE; a test compares the two.
ENERGY_UNITS = ("eV", "meV", "Hartree", "Rydberg", "kcal/mol", "kJ/mol")
LENGTH_UNITS = ("Angstrom", "Bohr", "nm")

HELP = "convert COLL, OC20, and whatever ASE reads to fairchem's LMDB"

DESCRIPTION = """
Convert files of labelled structures: COLL's extended xyz, OC20's pairs of .extxyz.xz and .txt,
ASE's trajectories and databases, OUTCAR, vasprun.xml, and with --pattern whatever else ASE reads.
Splits are those that the names of files or folders say (train, val, test), or what --split makes.
A conversion that was interrupted goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd data convert``."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files or folders")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder of the data set to write")
    parser.add_argument("--pattern", metavar="GLOB", help="files to take from folders: '*.cif'")
    parser.add_argument("--into", metavar="SPLIT", help="the split that all frames go to")
    parser.add_argument(
        "--split", metavar="TRAIN/VAL[/TEST]", help="split by trajectory, as in 0.8/0.1/0.1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --split (default: %(default)s)")
    parser.add_argument(
        "--group", metavar="WHAT",
        help="what a trajectory is: system (OC20), file, frame (each by itself), formula, or a "
        "key of the frames' info",
    )  # fmt: skip
    parser.add_argument(
        "--labels", choices=("both", "energy", "none"), default="both",
        help="energies and forces, energies alone, or structures alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--references", metavar="HOW", default="auto",
        help="what is taken off total energies: auto (OC20's and COLL's own, else fit), fit "
        "(least squares on train), none, or a JSON file {\"H\": -13.6, ...} in eV",
    )  # fmt: skip
    parser.add_argument(
        "--totals", action="store_true",
        help="write total energies, and the references to element_references.npz for stock's "
        "element_references: models then predict totals",
    )  # fmt: skip
    parser.add_argument("--energy-key", metavar="KEY", help="of the frames' info")
    parser.add_argument("--forces-key", metavar="KEY", help="of the frames' arrays")
    parser.add_argument("--energy-unit", choices=ENERGY_UNITS, default="eV")
    parser.add_argument("--length-unit", choices=LENGTH_UNITS, default="Angstrom")
    parser.add_argument(
        "--force-unit", metavar="ENERGY/LENGTH", help="Hartree/Bohr; else that of the other two"
    )
    parser.add_argument(
        "--cell", type=float, default=40.0, metavar="Å", help="of molecules (default: %(default)g)"
    )
    parser.add_argument(
        "--max-force", type=float, metavar="EV_PER_Å", help="leave out frames with a larger one"
    )
    parser.add_argument(
        "--max-skipped", type=float, default=0.01, metavar="SHARE",
        help="frames that may be unusable before all is refused (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-mixed", action="store_true", help="unlike elements or forces in splits and files"
    )
    parser.add_argument(
        "--processes", type=at_least(1), metavar="N",
        help="(default: the machine's cores, at most 16)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace DEST if it is there")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what is in the data set and how a config names it."""
    from fairchem_kd.data.convert.conversion import convert
    from fairchem_kd.data.create import default_processes

    conversion = conversion_of(args)
    start = time.monotonic()
    card = convert(conversion, args.dest, args.processes or default_processes(), args.force)
    took = time.monotonic() - start
    print(f"{args.dest}: converted in {took:.0f} s; details in {args.dest / 'card.json'}")
    print(summary(card))
    for note in [*card["notes"], *told_of_energies(card)]:
        print(f"note: {note}")
    print(snippet(card, args.dest))
    return 0


def conversion_of(args: argparse.Namespace) -> Conversion:
    """The options, checked; what they leave open is read off the first files.

    Raises:
        UserError: an option makes no sense, or sources cannot be read.
    """
    from fairchem_kd.data.convert.assemble import Conversion
    from fairchem_kd.data.convert.conversion import default_group, default_references, plan
    from fairchem_kd.data.convert.labels import Reading

    if args.into is not None and args.split is not None:
        raise UserError("--into and --split contradict each other; give one of them.")
    if args.into is not None and not re.fullmatch(r"[\w-]+", args.into):
        raise UserError(
            f"--into {args.into}: a split is a folder in DEST, and its name has letters, digits, "
            "'_' and '-' only, as in train."
        )
    given = None
    references = args.references
    if references not in ("auto", "fit", "none"):
        given, references = read_references(Path(references)), "file"
    if args.labels == "none":
        references = "none"
    draft = Conversion(
        sources=tuple(args.sources),
        pattern=args.pattern,
        into=args.into,
        shares=None if args.split is None else parse_shares(args.split),
        seed=args.seed,
        given_references=given,
        max_skipped=args.max_skipped,
        allow_mixed=args.allow_mixed,
        totals=args.totals,
    )
    parts = plan(draft)
    if references == "auto":
        references = default_references(parts)
    if args.totals and references == "none":
        raise UserError(
            "--totals needs energies, and an energy for each element: take --references fit or a "
            "JSON file, and no --labels none."
        )
    if args.totals and references != "file":
        references = "fit"  # OC20's and COLL's own are not energies of elements
    reading = Reading(
        labels=args.labels,
        references=references,
        group=args.group or default_group(parts, draft.shares is not None),
        energy_key=args.energy_key,
        forces_key=args.forces_key,
        energy_unit=args.energy_unit,
        force_unit=args.force_unit,
        length_unit=args.length_unit,
        cell=args.cell,
        max_force=args.max_force,
    )
    _ = reading.force_factor  # refuses an unknown unit before anything is read
    return Conversion(**{**vars(draft), "reading": reading})


def parse_shares(text: str) -> tuple[float, ...]:
    """``0.8/0.1/0.1``: the shares of train, val and test.

    Raises:
        UserError: it is something else.
    """
    from fairchem_kd.data.convert.assemble import SPLITS

    try:
        shares = tuple(float(share) for share in text.split("/"))
    except ValueError:
        shares = ()
    if not 2 <= len(shares) <= len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"--split {text}: give the shares of train and val, or of train, val and test, which "
            "add up to 1, as in 0.8/0.1/0.1."
        )
    return shares


def read_references(file: Path) -> dict[int, float]:
    """Energy per element in eV out of ``{"H": -13.6, ...}``.

    Raises:
        UserError: the file is not such a one.
    """
    from ase.data import chemical_symbols

    try:
        given = {chemical_symbols.index(name): float(one) for name, one in read_json(file).items()}
        if not all(map(math.isfinite, given.values())):
            raise ValueError("an energy in it is not finite")
        return given
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--references {file}: it has to be auto, fit, none, or a JSON file like "
            f'{{"H": -13.6, "O": -432.1}} in eV ({error}).'
        ) from error


def summary(card: dict[str, Any]) -> str:
    """A table of a card's splits."""
    from ase.data import chemical_symbols

    lines = [
        f"{'split':<8}{'frames':>9}{'traj.':>8}{'skipped':>9}{'atoms':>8}{'E min':>10}"
        f"{'E max':>10}{'E std':>9}{'F rms':>9}{'F max':>9}"
    ]
    for name, split in card["splits"].items():
        energy, largest = split.get("energy"), split.get("force_norm_max")
        cells = [f"{split['natoms']['mean']:>8.1f}"]
        cells += [
            f"{'-' if energy is None else format(energy[key], '.3f'):>{width}}"
            for key, width in (("min", 10), ("max", 10), ("std", 9))
        ]
        cells.append(f"{'-' if largest is None else format(split['force_rms'], '.3f'):>9}")
        cells.append(f"{'-' if largest is None else format(largest['max'], '.2f'):>9}")
        skipped = sum(split["skipped_frames"].values())
        start = f"{name:<8}{split['frames']:>9}{split['trajectories']:>8}{skipped:>9}"
        lines.append(start + "".join(cells))
    lines.append(f"eV and eV/Å; {card['energy_definition']}")
    lines.append(f"elements: {' '.join(chemical_symbols[z] for z in card['elements'])}")
    return "\n".join(lines)


def told_of_energies(card: dict[str, Any]) -> list[str]:
    """What the energies of a model that is trained on this will be."""
    from ase.data import chemical_symbols

    options, references = card["options"], card["reference_energies"]
    if options["labels"] == "none":
        return []
    each = ", ".join(f"{chemical_symbols[int(z)]} {e:.6g}" for z, e in (references or {}).items())
    if options.get("totals"):
        largest = max(
            max(abs(split["energy"][key]) for key in ("min", "max"))
            + split["natoms"]["max"] * max(map(abs, references.values()), default=0.0)
            for split in card["splits"].values()
        )
        exact = largest * 2.0**-24  # half of the last bit that float32 has there
        told = [
            f"energies are totals; with the transforms below, a model's energy in ASE is one too. "
            f"They are taken off in training: {each} eV per atom."
        ]
        if exact > 5e-4:
            told.append(
                f"fairchem adds references in single precision, in which totals of up to "
                f"{largest / 1e3:.3g} keV are off by up to {1e3 * exact:.1f} meV, in predictions "
                "and errors; labels are kept and learned in double precision. Without --totals "
                "nothing is lost."
            )
        return told
    if options["references"] == "none":
        return []
    what = {
        "oc20": "the reference energy of each system (third column of .txt)",
        "atomization": f"what the files' atomization energies leave out, about {each} eV per atom",
    }.get(options["references"], f"{each} eV per atom")
    return [
        f"taken off the total energies: {what}. A model's energy in ASE is what is left; give "
        "--totals for models that predict total energies."
    ]


def snippet(card: dict[str, Any], dest: Path) -> str:
    """The ``dataset`` block of a config."""
    lines = ["dataset:"]
    for name in card["splits"]:
        lines += [f"  {name}:", "    format: lmdb", f"    src: {dest / name}"]
        if name == "train" and card["normalizer"]:
            lines.append("    transforms:")
            if card["options"].get("totals"):
                file = dest / "element_references.npz"
                lines += ["      element_references:", f"        energy: {{file: {file}}}"]
            lines.append("      normalizer:")
            lines += [
                f"        {key}: {{mean: {values['mean']:.6f}, rmsd: {values['rmsd']:.6f}}}"
                for key, values in card["normalizer"].items()
            ]
    return "\n".join(lines)
