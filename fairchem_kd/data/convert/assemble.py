"""Putting the parts of a conversion together: checks, references, numbering, metadata and card."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from fairchem_kd._version import __version__
from fairchem_kd.data.card import FORMAT, versions, write_card
from fairchem_kd.data.convert.labels import Reading
from fairchem_kd.data.convert.shards import Tally, rewrite
from fairchem_kd.data.convert.sources import Part
from fairchem_kd.errors import UserError
from fairchem_kd.reading import read_json
from fairchem_kd.stock.neighbours import SHORTEST_CUTOFF
from fairchem_kd.stock.periodicity import ROOM

#: Marks a part that is complete, and holds what the checks compare.
DONE = "done.json"
#: Beside the splits, where energies are totals.
REFERENCES = "element_references.npz"
MOST_ELEMENTS = 118  # that stock's references are of
SPLITS = ("train", "val", "test")

#: Forces of one file over another's, where the units of one are Hartree/Bohr, kcal/mol/Å or so.
_MIXED_UNITS = 15.0
_ENOUGH_FRAMES = 20
#: Å: what the spread of energies over forces may be before units are asked about.
_SHIFTS = (0.015, 6.0)


@dataclass(frozen=True)
class Conversion:
    """What is to be converted, and how.

    ``shares`` are those of train, val and test (or of train and val) where frames are to be split
    at random by trajectory; None where the names of files say it, or all goes to ``into``.
    """

    sources: tuple[Path, ...]
    reading: Reading = field(default_factory=Reading)
    pattern: str | None = None
    into: str | None = None
    shares: tuple[float, ...] | None = None
    seed: int = 0
    given_references: dict[int, float] | None = None
    max_skipped: float = 0.01
    allow_mixed: bool = False
    #: write total energies, and the references to a file that stock takes off them
    totals: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": [str(source) for source in self.sources],
            "pattern": self.pattern,
            "into": self.into,
            "split": None if self.shares is None else list(self.shares),
            "seed": self.seed,
            "given_references": self.given_references,
            **({"totals": True} if self.totals else {}),
            **self.reading.as_dict(),
        }


def part_folder(work: Path, number: int) -> Path:
    """Where the shards of a part are."""
    return work / "parts" / f"{number:06d}"


def assemble(work: Path, parts: list[Part], conversion: Conversion) -> dict[str, Any]:
    """Make ``work/out`` of complete parts, and return its card.

    Raises:
        UserError: no frames, too many that cannot be used, or some that do not belong together.
    """
    done = [read_json(part_folder(work, n) / DONE) for n in range(len(parts))]
    held = {name for part in done for name in part["splits"]}
    names = [*(name for name in SPLITS if name in held), *sorted(held - set(SPLITS))]
    skipped: dict[str, Counter[str]] = {name: Counter() for name in names}
    for part in done:
        for name, reasons in part["skipped"].items():
            skipped.setdefault(name, Counter()).update(reasons)
    _check_frames(done, skipped, conversion)
    if not conversion.allow_mixed:
        _check_elements(done)
        _check_units(done, parts)
    tallies = {
        name: [part_folder(work, n) for n, part in enumerate(done) if name in part["splits"]]
        for name in names
    }
    references = _references(names[0], tallies[names[0]], conversion)
    if conversion.reading.references == "file":
        _check_given(done, references or {})
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    totals, unlike = {}, _unlike(done)
    for name, folders in tallies.items():
        taken_off = references if conversion.reading.references in ("fit", "file") else None
        totals[name] = _write(
            out / name, name, folders, taken_off, totals=conversion.totals, everywhere=unlike
        )
    if conversion.totals:
        _write_references(out / REFERENCES, references or {})
    card = _card(totals, skipped, references, conversion)
    card["notes"] = [*_repeated(totals), *_implausible(card), *_constrained(done), *_alone(done)]
    card["notes"] += _made_periodic(done)
    if conversion.reading.references == "fit":
        card["notes"] += _unexplained(totals, references or {})
    write_card(out, card)
    return card


def _write_references(file: Path, references: dict[int, float]) -> None:
    """What stock's ``element_references`` reads: eV by atomic number, in double precision."""
    values = np.zeros(MOST_ELEMENTS + 1)
    for z, value in references.items():
        values[z] = value
    np.savez(file, element_references=values)


def _write(
    out: Path,
    name: str,
    folders: list[Path],
    references: dict[int, float] | None,
    *,
    totals: bool,
    everywhere: bool,
) -> Tally:
    """The shards of one split in the order of the parts, and their ``metadata.npz``."""
    total = Tally()
    out.mkdir(parents=True)
    width = max(4, len(str(len(folders))))  # fairchem takes them in the order of their names
    for index, folder in enumerate(folders):
        tally = Tally.load(folder / f"{name}.npz")
        dest = out / f"data.{index:0{width}d}.lmdb"
        if references is None and not everywhere:
            _link(folder / f"{name}.lmdb", dest)
        else:
            tally.energy = rewrite(
                folder / f"{name}.lmdb", dest, references, totals=totals, everywhere=everywhere
            )
        total.merge(tally)
    columns = {key: np.array(getattr(total, key), np.int64) for key in ("natoms", "sid", "fid")}
    np.savez(out / "metadata.npz", **columns)
    return total


def _link(file: Path, dest: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(file, dest)
    except OSError:
        shutil.copyfile(file, dest)


def _constrained(done: list[dict[str, Any]]) -> Iterator[str]:
    """What is said where a data set cannot tell how atoms are held."""
    frames = sum(part["partly"] for part in done)
    if frames:
        yield (
            f"{frames} frames have constraints that leave atoms free in some direction or tie them "
            "to each other: a data set knows only free and fixed, and such atoms are free in it."
        )


def _kinds(done: list[dict[str, Any]]) -> list[tuple[bool, ...]]:
    """The periodic directions that there are."""
    return sorted({tuple(pbc) for part in done for pbc in part["pbc"]})


def _unlike(done: list[dict[str, Any]]) -> bool:
    """Whether stock could not put all into one batch: it takes one periodicity for all of it."""
    return len(_kinds(done)) > 1


def _made_periodic(done: list[dict[str, Any]]) -> Iterator[str]:
    """What is said where the periodicity of frames was changed."""
    if _unlike(done):
        shown = " and ".join("".join("FT"[p] for p in pbc) for pbc in _kinds(done))
        yield (
            f"The frames have unlike periodic directions ({shown}), and fairchem takes one for a "
            f"whole batch: all are written as periodic along every axis, with {ROOM:g} Å of room "
            "along those that are not, so that no image is in reach there."
        )


def _alone(done: list[dict[str, Any]]) -> Iterator[str]:
    """What is said of frames that most models cannot take."""
    frames = [frame for part in done for frame in part.get("alone", [])]
    if frames:
        yield (
            f"{len(frames)} frames have no two atoms within {SHORTEST_CUTOFF:g} Å of each other "
            f"(the first is {frames[0]}): models that see no further refuse them; leave them "
            "out, isolated atoms for example."
        )


def _check_frames(
    done: list[dict[str, Any]], skipped: dict[str, Counter[str]], conversion: Conversion
) -> None:
    """Refuse no frames at all, and too many that cannot be used."""
    kept = sum(split["frames"] for part in done for split in part["splits"].values())
    lost = sum((reasons for reasons in skipped.values()), Counter[str]())
    why = ", ".join(f"{count} {reason}" for reason, count in lost.most_common())
    if not kept:
        raise UserError(
            f"There are no frames to train on in {', '.join(map(str, conversion.sources))} "
            f"({why or 'every file is empty'}); name another folder or file."
        )
    if lost.total() > conversion.max_skipped * (kept + lost.total()):
        raise UserError(
            f"{lost.total()} of {kept + lost.total()} frames cannot be used ({why}), more than "
            f"--max-skipped {conversion.max_skipped:g} allows; mend the data, or allow more."
        )


def _check_elements(done: list[dict[str, Any]]) -> None:
    elements: dict[str, set[int]] = {}
    for part in done:
        for name, split in part["splits"].items():
            elements.setdefault(name, set()).update(split["elements"])
    for name, found in elements.items():
        strange = sorted(found - elements.get("train", found))
        if strange:
            raise UserError(
                f"The split {name} holds {', '.join(chemical_symbols[z] for z in strange)}, which "
                "train does not, so no model could know them: convert what belongs together, or "
                "give --allow-mixed."
            )


def _check_units(done: list[dict[str, Any]], parts: list[Part]) -> None:
    """Refuse files whose forces differ as units do."""
    sums: dict[Path, list[float]] = {}
    for part, held in zip(parts, done, strict=True):
        for split in held["splits"].values():
            found = sums.setdefault(part.file, [0.0, 0.0, 0.0])
            for index, key in enumerate(("frames", "atoms", "squares")):
                found[index] += split[key]
    sizes = {
        file: (squares / (3 * atoms)) ** 0.5
        for file, (frames, atoms, squares) in sums.items()
        if frames >= _ENOUGH_FRAMES and squares > 0
    }
    if not sizes:
        return
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[most] > _MIXED_UNITS * sizes[least]:
        raise UserError(
            f"Forces in {most} are {sizes[most] / sizes[least]:.0f} times those in {least} (rms "
            f"{sizes[most]:.3g} and {sizes[least]:.3g} eV/Å), so their units seem to differ: "
            "convert them apart with --force-unit, or give --allow-mixed."
        )


def _references(name: str, folders: list[Path], conversion: Conversion) -> dict[int, float] | None:
    """Energy per element in eV, of the first split (train); None where no such number is used.

    OC20's references belong to systems, and no number per element says them.
    """
    reading = conversion.reading
    if conversion.given_references is not None:
        return conversion.given_references
    if reading.labels == "none" or reading.references in ("oc20", "none"):
        return None
    total = Tally()
    for folder in folders:
        part = Tally.load(folder / f"{name}.npz")
        total.normal, total.moment = total.normal + part.normal, total.moment + part.moment
        total.elements |= part.elements
    return total.references()


def _check_given(done: list[dict[str, Any]], references: dict[int, float]) -> None:
    held = {z for part in done for split in part["splits"].values() for z in split["elements"]}
    missing = sorted(held - references.keys())
    if missing:
        raise UserError(
            f"--references has no energy for {_symbols(missing)}, which the frames hold: add "
            "every element to the file."
        )


def _repeated(totals: dict[str, Tally]) -> Iterator[str]:
    """Structures that are there twice, most of all on both sides of a split."""
    seen = {name: np.unique(np.array(tally.digest, np.int64)) for name, tally in totals.items()}
    for name, tally in totals.items():
        again = len(tally.digest) - len(seen[name])
        if again:
            yield f"{again} of the {len(tally.digest)} frames of {name} are there already."
        shared = np.intersect1d(seen[name], seen["train"]).size if "train" in seen else 0
        if shared and name != "train":
            yield (
                f"{shared} structures of {name} are in train too: errors on {name} look better "
                "than they are."
            )


def _implausible(card: dict[str, Any]) -> Iterator[str]:
    """Energies and forces that hardly belong together: their units may not be what was said.

    The spread of relative energies over the force along all coordinates is a displacement: 0.2 to
    0.5 Å for OC20 and for colliding molecules.
    """
    if card["options"]["references"] == "none":
        return
    for name, split in card["splits"].items():
        force = split.get("force_rms")
        if not force or "energy" not in split or split["frames"] < _ENOUGH_FRAMES:
            continue
        coordinates = 3 * split["natoms"]["mean"]
        shift = split["energy"]["std"] / (force * coordinates**0.5)
        if not _SHIFTS[0] < shift < _SHIFTS[1]:
            yield (
                f"Energies of {name} vary by {split['energy']['std']:.3g} eV and forces are "
                f"{force:.3g} eV/Å, as if atoms moved by {shift:.2g} Å: are --energy-unit and "
                "--force-unit right, and references taken off?"
            )


def _unexplained(totals: dict[str, Tally], references: dict[int, float]) -> Iterator[str]:
    """With --allow-mixed, elements that the fit of references has not seen."""
    for name, tally in totals.items():
        missing = sorted(tally.elements - references.keys())
        if missing:
            yield (
                f"{name} holds {_symbols(missing)}, for which train gives no reference energy: "
                "none was taken off."
            )


def _symbols(elements: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in elements)


_DEFINITIONS = {
    "oc20": "energy label = total energy - reference energy of the system (third column of .txt)",
    "atomization": "energy label = atomization_energy of the files = total energy - sum over atoms "
    "of reference_energies[element]",
    "fit": "energy label = total energy - sum over atoms of reference_energies[element]; add them "
    "back for total energies",
    "none": "energy label = total energy",
}
_TOTALS = (
    f"energy label = total energy; {REFERENCES} holds reference_energies, which "
    "dataset.train.transforms.element_references takes off in training and adds to predictions; "
    "statistics and normaliser are of what is left"
)
_METHODS = {
    "atomization": "least squares of total energy - atomization_energy, eV per atom",
    "fit": "least squares of the training set's total energies, eV per atom",
    "file": "given, eV per atom",
}


def _card(
    totals: dict[str, Tally],
    skipped: dict[str, Counter[str]],
    references: dict[int, float] | None,
    conversion: Conversion,
) -> dict[str, Any]:
    reading = conversion.reading
    splits = {name: tally.statistics(skipped[name]) for name, tally in totals.items()}
    first = splits[next(iter(splits))]
    kind = reading.references
    normalizer = {}
    if "energy" in first:
        energy = first["energy"]
        normalizer["energy"] = {"mean": energy["mean"], "rmsd": energy["std"] or 1.0}
    if "force_rms_free" in first:
        normalizer["forces"] = {"mean": 0.0, "rmsd": first["force_rms_free"] or 1.0}
    given = None if references is None else {str(z): value for z, value in references.items()}
    return {
        "format": FORMAT,
        "options": {"recipe": "convert", **conversion.as_dict()},
        "method": "converted; see options.sources",
        "note": (
            "Structures without a cell are in the middle of one of options.cell Å, so models take "
            "use_pbc: true."
        ),
        "units": {"energy": "eV", "forces": "eV/Å", "positions": "Å", "cell": "Å"},
        "energy_definition": _TOTALS
        if conversion.totals
        else _DEFINITIONS["fit" if kind == "file" else kind],
        "reference_energies": given,
        "reference_method": _METHODS.get(kind),
        "normalizer": normalizer,
        "elements": sorted(set().union(*(tally.elements for tally in totals.values()))),
        "quarters": {},
        "splits": splits,
        "versions": {"fairchem-kd": __version__, **versions("ase", "numpy")},
    }
