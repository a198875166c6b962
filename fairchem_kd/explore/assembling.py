"""A data set of what was found: nothing twice, nothing of a test, everything in its own split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairchem_kd._version import __version__
from fairchem_kd.data.card import FORMAT, versions, write_card
from fairchem_kd.data.convert.shards import Shard, Tally
from fairchem_kd.data.frames import Frame
from fairchem_kd.data.writer import to_data
from fairchem_kd.errors import UserError
from fairchem_kd.explore.duplicates import Known
from fairchem_kd.explore.following import BELOW, BEYOND, CRASHED, KEPT_OF_CRASH
from fairchem_kd.explore.group_file import read_group
from fairchem_kd.explore.settings import MD, RATTLE, RELAX, STUDENT, Found, Settings
from fairchem_kd.explore.starts import TRAIN, Source, Start, read_starts

DUPLICATE = "there already"
HELD_OUT = "there in a split for validation or tests"
#: Where a frame came from, beside what stock reads: data, place there, how, and Å, K or eV/Å.
_MORE = ("data", "source", "kind", "value")
_METHODS = {
    RATTLE: "displaced copies",
    RELAX: "rattled and relaxed in turn with the teacher's forces",
    MD: "Langevin dynamics of the teacher",
    STUDENT: "Langevin dynamics of the student, where its teacher says something else",
}
_SHOWN = 4  # reasons in a sentence


class NothingKept(UserError):
    """An exploration found nothing to keep; ``told`` is what a card would have said of it."""

    def __init__(self, message: str, told: dict[str, Any]) -> None:
        super().__init__(message)
        self.told = told


@dataclass
class _Split:
    """The frames that one split gets: of which group's file, and which there."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


def assemble(
    out: Path,
    files: Sequence[Path],
    groups: Sequence[Sequence[Start]],
    settings: Settings,
    told: dict[str, Any],
    *,
    splits: Sequence[str],
    apart_from: Sequence[Source],
    known: Sequence[Source] = (),
) -> dict[str, Any]:
    """Write the data set ``out`` and return its card.

    Args:
        out: a folder that is not there.
        files: of the groups, see :mod:`fairchem_kd.explore.group_file`.
        groups: their structures to begin with.
        settings: how the frames were made.
        told: what else the card's options say: sources, teacher, student.
        splits: that the structures are of.
        apart_from: with whose structures no frame may be alike.
        known: whose structures are there already.

    Raises:
        NothingKept: there is no frame.
        OSError, ValueError: a group's file cannot be read.
    """
    chosen, counts, differences = _choose(files, groups, settings, splits, apart_from, known)
    made = Counter(counts)
    exploration = _exploration(chosen, made, differences, settings)
    if not any(split.rows for split in chosen.values()):
        raise NothingKept(_why_nothing(made, differences, settings), exploration)
    for name, split in chosen.items():
        if split.rows:
            _write(out / name, split, files, groups)
    card = _card({n: s for n, s in chosen.items() if s.rows}, settings, exploration, told)
    write_card(out, card)
    return card


def _choose(
    files: Sequence[Path],
    groups: Sequence[Sequence[Start]],
    settings: Settings,
    splits: Sequence[str],
    apart_from: Sequence[Source],
    before: Sequence[Source],
) -> tuple[dict[str, _Split], Counter[str], list[float]]:
    """The frames that are kept, in the order of their sources."""
    known, held = Known(settings.alike), Known(settings.alike)
    if settings.alike > 0:
        for start in (start for group in groups for start in group):
            known.add(start.numbers, start.pos, start.cell, start.pbc)
        for sources, where in ((before, known), (apart_from, held)):
            for start in (start for source in sources for start in read_starts(source)):
                where.add(start.numbers, start.pos, start.cell, start.pbc)
    chosen = {name: _Split() for name in splits}
    counts: Counter[str] = Counter()
    differences: list[float] = []
    for number, (file, group) in enumerate(zip(files, groups, strict=True)):
        said = read_group(file)
        counts.update(said.counts)
        differences += said.differences
        for row, one in enumerate(said.found):
            start = group[one.start]
            structure = (start.numbers, one.pos, start.cell, start.pbc)
            if known.has(*structure):
                counts[DUPLICATE] += 1
            elif held.has(*structure):
                counts[HELD_OUT] += 1
            else:
                known.add(*structure)
                chosen[start.split].rows.append((number, row))
    if settings.most is not None:
        for split in chosen.values():
            split.rows = _evenly(split.rows, settings.most)
    return chosen, counts, differences


def _evenly(rows: list[Any], most: int) -> list[Any]:
    if len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def _write(
    folder: Path, split: _Split, files: Sequence[Path], groups: Sequence[Sequence[Start]]
) -> None:
    """One split: its LMDB, and the index beside it."""
    folder.mkdir(parents=True)
    shard = Shard(folder / "data.0000.lmdb")
    numbers: dict[int | str, int] = {}  # of trajectories
    frames: Counter[int | str] = Counter()
    try:
        for start, one in _frames(split.rows, files, groups):
            fid = frames[start.sid]
            frames[start.sid] += 1
            shard.add(_sample(start, one, fid))
            _count(split.tally, start, one, numbers.setdefault(start.sid, len(numbers)), fid)
            told = (start.sid, start.data, start.place, one.kind, one.value)
            for name, value in zip(("sid", *_MORE), told, strict=True):
                split.columns[name].append(value)
        shard.close()
    except BaseException:
        shard.abandon()
        raise
    np.savez(
        folder / "metadata.npz",
        natoms=np.array(split.tally.natoms, np.int64),
        fid=np.array(split.tally.fid, np.int64),
        **{name: np.array(values) for name, values in split.columns.items()},
    )


def _frames(
    rows: Sequence[tuple[int, int]], files: Sequence[Path], groups: Sequence[Sequence[Start]]
) -> Iterator[tuple[Start, Found]]:
    read, found = -1, []
    for number, row in rows:
        if number != read:
            read, found = number, read_group(files[number]).found
        yield groups[number][found[row].start], found[row]


def _sample(start: Start, one: Found, fid: int) -> Any:
    """As fairchem reads it; without labels where there is no teacher."""
    zero = np.zeros((len(one.pos), 3), "<f4")
    frame = Frame(
        numbers=start.numbers,
        pos=one.pos.astype("<f4"),
        cell=start.cell.astype("<f4"),
        tags=start.tags.astype(np.int32),
        fixed=start.fixed.astype(np.int32),
        energy=0.0,
        forces=zero if one.answer is None else one.answer.forces.astype("<f4"),
    )
    energy = 0.0 if one.answer is None else one.answer.energy
    data = to_data(frame, energy, start.sid, fid)  # type: ignore[arg-type]  # ids may be text
    data.pbc = torch.from_numpy(start.pbc.copy())[None]
    if one.answer is None:
        del data.energy, data.forces
    return data


def _count(tally: Tally, start: Start, one: Found, trajectory: int, fid: int) -> None:
    said = one.answer
    tally.add(
        start.numbers,
        start.fixed,
        None if said is None else said.forces,
        float("nan") if said is None else said.energy,
        0.0,
        trajectory,
        fid,
        0,
    )


def _exploration(
    chosen: dict[str, _Split], counts: Counter[str], differences: list[float], settings: Settings
) -> dict[str, Any]:
    """What a card tells of how it went."""
    told: dict[str, Any] = {
        "kept": sum(len(split.rows) for split in chosen.values()),
        "left_out": dict(sorted(counts.items())),
    }
    if settings.window is not None:
        told["window"] = [settings.window.low, settings.window.high]
        told["looked_at"] = len(differences)
        told["below"] = counts[BELOW]
        told["inside"] = sum(map(settings.window.holds, differences))
        told["beyond"] = counts[BEYOND]
        told["crashes"] = counts[CRASHED]
        if differences:
            told["difference_median"] = float(np.median(differences))
            told["difference_largest"] = float(np.max(differences))
    return told


def _why_nothing(counts: Counter[str], differences: list[float], settings: Settings) -> str:
    """The sentence where no frame is left."""
    why = ", ".join(f"{number} {reason}" for reason, number in counts.most_common(_SHOWN))
    if settings.window is not None and differences:
        window = settings.window
        return (
            f"The window of {window.low:g} to {window.high:g} eV/Å is empty: in {len(differences)} "
            f"frames of its dynamics the student's forces differ from the teacher's by "
            f"{np.median(differences):.3g} eV/Å in the median and {np.max(differences):.3g} at "
            "most; give another --window, longer or hotter dynamics (--steps, --temperature), or "
            "be content with the student."
        )
    mend = {
        RATTLE: "give a smaller or larger --std",
        RELAX: "give a smaller --std or a higher --temperature",
    }.get(settings.mode, "give more --steps, fewer between two frames (--every), or less heat")
    return (
        f"No structure is left ({why or 'nothing was made'}): {mend}, or other limits "
        "(--min-distance, --max-force, --max-gap, --alike)."
    )


def _card(
    splits: dict[str, _Split],
    settings: Settings,
    exploration: dict[str, Any],
    told: dict[str, Any],
) -> dict[str, Any]:
    labelled = any(split.tally.largest for split in splits.values())
    statistics = {name: split.tally.statistics(Counter()) for name, split in splits.items()}
    normalizer = {}
    if labelled:
        trained = statistics.get(TRAIN) or next(iter(statistics.values()))
        energy = trained["energy"]
        normalizer["energy"] = {"mean": energy["mean"], "rmsd": energy["std"] or 1.0}
        normalizer["forces"] = {"mean": 0.0, "rmsd": trained["force_rms_free"] or 1.0}
    kinds = Counter(kind for split in splits.values() for kind in split.columns["kind"])
    return {
        "format": FORMAT,
        "options": {
            "recipe": "explore",
            "labels": "both" if labelled else "none",
            "references": "none",
            **told,
            **settings.as_dict(),
        },
        "method": _METHODS[settings.mode],
        "note": "A frame has the sid of the structure that it came of, and is in its split; "
        "metadata.npz says of each which one that was (data, and its place there, source), how it "
        "was made (kind), and at what scale (value: Å of noise, K, or eV/Å between student and "
        f"teacher, of frames before a {KEPT_OF_CRASH} the teacher's largest force).",
        "units": {"energy": "eV", "forces": "eV/Å", "positions": "Å", "cell": "Å"},
        "energy_definition": "energy label = what the teacher says" if labelled else "no labels",
        "reference_energies": None,
        "reference_method": None,
        "normalizer": normalizer,
        "elements": sorted(set().union(*(split.tally.elements for split in splits.values()))),
        "quarters": {},
        "splits": statistics,
        "exploration": {**exploration, "kinds": dict(sorted(kinds.items()))},
        "notes": [],
        "versions": {"fairchem-kd": __version__, **versions("ase", "numpy")},
    }
