"""The structures that an exploration begins with, and the splits that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase
import numpy as np
from numpy.typing import NDArray

from fairchem_kd.analysis.subjects.structures import files_in, open_structures
from fairchem_kd.data.convert.sources import is_known, split_of
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.stock.periodicity import axes, everywhere, tags_of

if TYPE_CHECKING:
    from torch_geometric.data import Data

Array = NDArray[np.float64]
TRAIN = "train"
_HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class Source:
    """A split, or a file, with structures to begin with."""

    path: Path
    split: str  #: to which its own belong, and all that comes of them


@dataclass(frozen=True)
class Start:
    """One structure to begin with."""

    split: str
    data: str  #: its source
    place: int  #: in that
    sid: int | str  #: of its trajectory, which what comes of it inherits
    numbers: NDArray[np.int64]  #: (N,)
    pos: Array  #: Å, (N, 3), in single precision
    cell: Array  #: Å, (3, 3)
    pbc: NDArray[np.bool_]  #: (3,)
    tags: NDArray[np.int64]  #: (N,)
    fixed: NDArray[np.bool_]  #: (N,)
    digest: bytes = field(repr=False)  #: of all this but its names

    def __str__(self) -> str:
        formula = ase.Atoms(numbers=self.numbers).get_chemical_formula()
        return f"structure {self.place} of {self.split} ({formula})"

    @property
    def free(self) -> NDArray[np.bool_]:
        return ~self.fixed

    def atoms(self) -> ase.Atoms:
        """As potentials take it."""
        return ase.Atoms(self.numbers, self.pos, cell=self.cell, pbc=self.pbc, tags=self.tags)

    def settled(self, pos: Array) -> Array:
        """Positions, Å, as a data set keeps them: in the cell, and in single precision.

        What is said of them is then said of what is kept. Fixed atoms stay where they are.
        """
        from ase.geometry import wrap_positions

        inside = pos
        if self.pbc.any():
            inside = wrap_positions(pos, self.cell, pbc=self.pbc, eps=0)
        return np.where(self.fixed[:, None], self.pos, inside).astype("<f4").astype(np.float64)

    def generator(self, seed: int, *purpose: object) -> np.random.Generator:
        """Random numbers of this structure's own: whatever else is explored, it gets the same."""
        told = "/".join(map(str, (seed, *purpose))).encode()
        key = hashlib.blake2b(self.digest + told, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def find_sources(paths: Sequence[Path], splits: Sequence[str] | None) -> list[Source]:
    """The splits and files that are named, each once.

    Args:
        paths: folders of data sets, of splits, LMDBs, or files that ASE reads.
        splits: of data sets that have several, by default train.

    Raises:
        UserError: a path that is not there, or a data set without such a split.
    """
    found: list[Source] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist in {Path.cwd()}; name a file of structures.")
        found += _sources_in(path, splits)
    names = [source.path.resolve() for source in found]
    for name, source in zip(names, found, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{source.path} is given twice: name every source once.")
    return found


def _sources_in(path: Path, splits: Sequence[str] | None) -> list[Source]:
    inside = _splits_in(path)
    if inside:
        wanted = list(splits or [TRAIN])
        for name in wanted:
            if name not in inside:
                raise UserError(
                    f"The data set {path} has no split {name}{did_you_mean(name, inside)}: name "
                    "others with --splits."
                )
        return [Source(inside[name], name) for name in wanted]
    if _is_split(path):
        named = [Source(path, path.absolute().name)]
    elif path.suffix == ".lmdb":
        named = [Source(path, path.absolute().parent.name)]
    else:
        named = [Source(file, split_of(file, [path]) or TRAIN) for file in files_in(path)]
        if path.is_dir() and len({source.split for source in named}) > 1:
            splits = splits or [TRAIN]  # as of a data set with several
    return [source for source in named if not splits or source.split in splits] or _none(path)


def _none(path: Path) -> list[Source]:
    raise UserError(
        f"{path} has nothing of the splits that --splits names, or of {TRAIN} without it: name "
        "others."
    )


def _splits_in(path: Path) -> dict[str, Path]:
    """The splits of a data set's folder, by name; none of another folder."""
    if not path.is_dir() or _is_split(path):
        return {}
    return {one.name: one for one in sorted(path.iterdir()) if one.is_dir() and _is_split(one)}


def _is_split(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.lmdb"))


def beside(sources: Sequence[Source]) -> list[Source]:
    """The splits beside the sources that are for validation and tests, each once."""
    found = {one.path: one for source in sources for one in _held_out(source)}
    return list(found.values())


def is_held_out(source: Source) -> bool:
    """Whether its name says that it is for validation or tests."""
    return _word(source.split) in _HELD_OUT


def _held_out(source: Source) -> list[Source]:
    own = _word(source.split)
    return [
        one
        for one in _beside(source.path.absolute())
        if is_held_out(one) and _word(one.split) != own and one.path != source.path.absolute()
    ]


def _beside(path: Path) -> list[Source]:
    """The splits of its data set, if it is of one; of other files those that lie in its folder."""
    split = path.parent if path.suffix == ".lmdb" else path
    if _is_split(split):
        return [Source(one, name) for name, one in _splits_in(split.parent).items()]
    if path.is_dir():
        return []
    folders = [path.parent]
    if split_of(path.parent, []):  # train/frames.xyz, and test/frames.xyz beside it
        folders += [one for one in path.parent.parent.iterdir() if one.is_dir()]
    files = {one for folder in folders for one in folder.iterdir() if is_known(one)}
    return [Source(file, split_of(file, [file.parent])) for file in sorted(files) if file.is_file()]


def _word(name: str) -> str:
    """Train, val or test, where a split's name has that word; else the name."""
    return split_of(Path(name), []) or name


def read_starts(source: Source, limit: int | None = None) -> Iterator[Start]:
    """The structures of a source, in order.

    Args:
        source: where they are.
        limit: so many at most, evenly spread over it.

    Raises:
        UserError: it cannot be read, holds none, or one that is not finite or has no atoms.
    """
    with open_structures(source.path, limit=limit) as structures:
        empty = True
        for place, sample in structures.numbered():
            empty = False
            yield start_of(sample, source, place)
    if empty:
        raise UserError(f"{source.path} holds no structure; name a file that does.")


def told_apart(sources: Sequence[Source], held: Sequence[Sequence[Start]]) -> Iterator[list[Start]]:
    """The structures of sources, with no trajectory called as one of another data set is.

    Where two in one split have a name in common, or one has numbers and the other has words, the
    trajectories of that split are numbered anew, in order.
    """
    named: dict[str, dict[tuple[Path, int | str], int]] = {}
    for source, starts in zip(sources, held, strict=True):
        names = named.setdefault(source.split, {})
        for start in starts:
            names.setdefault((_data_set(source), start.sid), len(names))
    for source, starts in zip(sources, held, strict=True):
        numbers, place = named[source.split], _data_set(source)
        bare = {name for _, name in numbers}
        if len(bare) == len(numbers) and len(set(map(type, bare))) == 1:
            yield list(starts)
        else:
            yield [replace(start, sid=numbers[place, start.sid]) for start in starts]


def _data_set(source: Source) -> Path:
    """Of which names are of one kind: a file, or the folder of LMDBs."""
    path = source.path.absolute()
    return path.parent if path.suffix == ".lmdb" else path


def start_of(sample: Data, source: Source, place: int) -> Start:
    """A sample as a structure to begin with.

    Raises:
        UserError: a position or its cell is not finite, its cell is flat, or it has no atoms.
    """
    pos = np.asarray(sample.pos, "<f4")
    numbers = np.asarray(sample.atomic_numbers).astype(np.int64)
    cell = np.asarray(sample.cell, "<f4").reshape(3, 3)
    if not len(numbers):
        raise UserError(f"Structure {place} of {source.path} has no atoms: leave it out.")
    if not (np.isfinite(pos).all() and np.isfinite(cell).all()):
        raise UserError(
            f"Structure {place} of {source.path} has a position or a cell that is not finite: "
            "mend it, or leave it out."
        )
    given = getattr(sample, "pbc", None)
    pbc = axes(None if given is None else np.asarray(given, bool).reshape(3), cell)
    try:
        everywhere(cell, pbc, pos)
    except ValueError:
        raise UserError(
            f"Structure {place} of {source.path} is periodic along vectors of its cell that lie in "
            "a plane: mend its cell or its pbc, or leave it out."
        ) from None
    tags = np.asarray(_or_none(sample, "tags", numbers)).astype(np.int64)
    if not tags.any():
        tags = tags_of(len(numbers), bool(pbc.any()))
    fixed = np.asarray(_or_none(sample, "fixed", numbers)) != 0
    digest = hashlib.blake2b(numbers.tobytes() + pos.tobytes() + cell.tobytes(), digest_size=16)
    return Start(
        source.split,
        str(source.path),
        place,
        _name(getattr(sample, "sid", None), place),
        numbers,
        pos.astype(np.float64),
        cell.astype(np.float64),
        np.asarray(pbc, bool),
        tags,
        fixed,
        digest.digest(),
    )


def _or_none(sample: Data, key: str, numbers: NDArray[Any]) -> Any:
    value = getattr(sample, key, None)
    return np.zeros(len(numbers), int) if value is None else value


def _name(sid: Any, place: int) -> int | str:
    """A trajectory's id as a plain value; the place of a structure that has none."""
    if sid is None:
        return place
    value = sid.item() if hasattr(sid, "item") else sid
    return int(value) if isinstance(value, int | float) else str(value)


def elements_of(starts: Iterable[Start]) -> NDArray[np.int64]:
    """All atomic numbers that occur."""
    return np.unique(np.concatenate([start.numbers for start in starts]))
