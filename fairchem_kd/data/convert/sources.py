"""Files of labelled structures: which there are, how they are cut into parts, how they are read.

Known are the pairs in which OC20 is published (``NAME.extxyz.xz`` or ``NAME.extxyz`` with
``NAME.txt``, whose lines are ``system,frame,reference energy``), extended xyz, ASE's trajectories
and databases, and whatever else ``ase.io`` reads. A part is what one worker reads in one go, frame
by frame: memory does not grow with the size of a file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import ase.db
import ase.io
from ase import Atoms
from ase.io.trajectory import Trajectory

from fairchem_kd.errors import UserError

XYZ = (".xyz", ".extxyz")
TRAJECTORY = (".traj",)
DATABASE = (".db",)
#: Other files that a folder is searched for; a single file, or --pattern, may name any.
OTHERS = ("OUTCAR", "vasprun.xml", ".xtd", ".cfg", ".gen")
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}

FRAMES_PER_PART = 5000
_FRAMES_PER_READ = 64  # of extended xyz, handed to ASE at once

#: Splits by the words that published files have in their names.
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Part:
    """Frames ``first`` to ``first + count`` of a file (``count`` None: to its end)."""

    file: Path
    kind: str  #: oc20, xyz, trajectory, database or ase
    number: int  #: of the file, in the order of the sources
    split: str  #: where its frames go; "" where the frames decide
    first: int = 0
    count: int | None = None
    offset: int = 0  #: of the first frame in an xyz file, in bytes


@dataclass
class Structure:
    """One structure as it stands in its file, labels in its calculator or its info."""

    atoms: Atoms
    frame: int  #: its number within the file
    system: str | None = None  #: OC20's name of the system, ``random1234``
    reference: float | None = None  #: OC20's reference energy, eV
    fid: int | None = None


def find_files(sources: Iterable[Path], pattern: str | None = None) -> list[Path]:
    """The files of the sources, in order: a file itself, of a folder those that are known.

    Raises:
        UserError: a source does not exist, or a folder has no such file.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_file():
            found.append(source)
            continue
        if not source.is_dir():
            raise UserError(f"{source} does not exist; name a file or a folder with structures.")
        inside = source.rglob(pattern or "*")
        files = sorted(f for f in inside if f.is_file() and not f.name.startswith("."))
        if pattern is None:
            files = [file for file in files if _is_known(file)]
        if not files:
            what = f"no file that matches {pattern}" if pattern else "no file of structures in it"
            raise UserError(
                f"The folder {source} has {what} (.extxyz, .xyz, .traj, .db, OUTCAR, vasprun.xml, "
                "also .xz and .gz): name another folder, or give --pattern '*.EXT'."
            )
        found += files
    if len(set(found)) < len(found):
        twice = next(str(file) for file in found if found.count(file) > 1)
        raise UserError(f"{twice} is given twice; name every file once.")
    return found


def _is_known(file: Path) -> bool:
    bare = _bare_suffix(file)
    return bare in (*XYZ, *TRAJECTORY, *DATABASE) or file.name.endswith(OTHERS)


def _bare_suffix(file: Path) -> str:
    """The suffix without that of a compression."""
    if file.suffix in _OPENERS:
        file = file.with_suffix("")
    return file.suffix


def log_of(file: Path) -> Path:
    """Where OC20's ``.txt`` for ``file`` would be."""
    while file.suffix in (*XYZ, *_OPENERS):
        file = file.with_suffix("")
    return file.with_name(file.name + ".txt")


def kind_of(file: Path) -> str:
    suffix = _bare_suffix(file)
    if suffix in XYZ:
        return "oc20" if log_of(file).is_file() else "xyz"
    if suffix in TRAJECTORY:
        return "trajectory"
    return "database" if suffix in DATABASE else "ase"


def split_of(file: Path, sources: Iterable[Path]) -> str:
    """``train``, ``val`` or ``test``, where the file's name or its folder's has that word."""
    names = [file.name]
    for source in sources:
        if file.is_relative_to(source):
            names += [*reversed(file.relative_to(source).parts[:-1]), source.absolute().name]
    for name in names:
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS]
        if words:
            return _SPLIT_WORDS[words[0]]
    return ""


def parts_of(file: Path, number: int, split: str) -> list[Part]:
    """The parts of a file, of about `FRAMES_PER_PART` frames where it can be entered anywhere.

    Raises:
        UserError: it cannot be read.
    """
    kind = kind_of(file)
    if kind == "xyz" and file.suffix in XYZ:
        starts = _xyz_offsets(file)
        return [
            Part(file, kind, number, split, first, FRAMES_PER_PART, offset)
            for first, offset in starts
        ]
    if kind not in ("trajectory", "database"):
        return [Part(file, kind, number, split)]
    try:
        if kind == "trajectory":
            with Trajectory(str(file)) as trajectory:
                frames = len(trajectory)
        else:
            frames = ase.db.connect(str(file)).count()
    except Exception as error:  # of any backend
        raise _unreadable(file, error) from error
    return [
        Part(file, kind, number, split, first, min(FRAMES_PER_PART, frames - first))
        for first in range(0, frames, FRAMES_PER_PART)
    ]


def _xyz_offsets(file: Path) -> list[tuple[int, int]]:
    """Number and offset of every `FRAMES_PER_PART`-th frame."""
    starts: list[tuple[int, int]] = []
    with open(file, "rb") as lines:
        frame = 0
        while True:
            offset = lines.tell()
            head = lines.readline()
            if not head:
                return starts
            if not head.strip():  # between frames, or after the last
                continue
            if frame % FRAMES_PER_PART == 0:
                starts.append((frame, offset))
            for _ in range(_count(head, file, frame) + 1):
                lines.readline()
            frame += 1


def _count(head: str | bytes, file: Path, frame: int) -> int:
    try:
        return int(head)
    except ValueError:
        shown = head.decode(errors="replace") if isinstance(head, bytes) else head
        raise UserError(
            f"{file} is not extended xyz: frame {frame} begins with {shown.strip()[:40]!r} instead "
            "of a number of atoms; mend the file, or leave it out."
        ) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(f"{file} cannot be read ({reason}); copy it again, or leave it out.")


def read_part(part: Part) -> Iterator[Structure]:
    """The structures of a part, in order.

    Raises:
        UserError: the file is damaged, or an OC20 pair has unequal lengths.
    """
    readers = {
        "oc20": _read_oc20,
        "xyz": _read_xyz,
        "trajectory": _read_trajectory,
        "database": _read_database,
        "ase": _read_any,
    }
    try:
        yield from readers[part.kind](part)
    except UserError:
        raise
    except Exception as error:  # ASE's readers raise whatever went wrong inside
        raise _unreadable(part.file, error) from error


def _open_text(file: Path) -> TextIO:
    opener = _OPENERS.get(file.suffix, open)
    return cast(TextIO, opener(file, "rt", encoding="utf-8"))


def _read_xyz(part: Part) -> Iterator[Structure]:
    with _open_text(part.file) as text:
        if part.offset:
            text.seek(part.offset)
        number = part.first
        for block in _xyz_blocks(text, part):
            for atoms in ase.io.read(io.StringIO(block), index=":", format="extxyz"):
                yield Structure(atoms, number)
                number += 1


def _xyz_blocks(text: TextIO, part: Part) -> Iterator[str]:
    """The text of some frames at a time."""
    lines: list[str] = []
    frame, end = part.first, None if part.count is None else part.first + part.count
    while end is None or frame < end:
        head = text.readline()
        if not head:
            break
        if not head.strip():  # between frames, or after the last
            continue
        count = _count(head, part.file, frame)
        body = [text.readline() for _ in range(count + 1)]
        if not (body[-1].strip() if count else body[-1]):  # without atoms, the comment may be blank
            raise UserError(
                f"{part.file} is truncated in frame {frame}; copy or download it again."
            )
        if not body[-1].endswith("\n"):
            body[-1] += "\n"
        lines += [head, *body]
        frame += 1
        if (frame - part.first) % _FRAMES_PER_READ == 0:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _read_oc20(part: Part) -> Iterator[Structure]:
    log = log_of(part.file)
    with open(log, encoding="utf-8") as lines:
        for structure in _read_xyz(part):
            line = lines.readline().strip()
            if not line:
                raise UserError(
                    f"{log} has {structure.frame} lines, but {part.file.name} more frames; "
                    "download both again."
                )
            try:
                system, frame, *rest = line.split(",")
                structure.system, structure.fid = system, int(re.sub(r"\D", "", frame))
                structure.reference = float(rest[0]) if rest else None
            except ValueError:
                raise UserError(
                    f"{log}, line {structure.frame + 1}, is {line[:60]!r} instead of "
                    "system,frame,reference energy; it is not a .txt of OC20."
                ) from None
            yield structure
        if lines.readline().strip():
            raise UserError(
                f"{part.file} has fewer frames than {log.name} has lines; download both again."
            )


def _read_trajectory(part: Part) -> Iterator[Structure]:
    with Trajectory(str(part.file)) as trajectory:
        for number in range(part.first, part.first + (part.count or 0)):
            yield Structure(trajectory[number], number)


def _read_database(part: Part) -> Iterator[Structure]:
    rows = ase.db.connect(str(part.file)).select(limit=part.count, offset=part.first, sort="id")
    for number, row in enumerate(rows, part.first):
        atoms = row.toatoms()
        atoms.info.update(row.key_value_pairs)
        yield Structure(atoms, number)


def _read_any(part: Part) -> Iterator[Structure]:
    for number, atoms in enumerate(ase.io.iread(str(part.file), index=":")):
        yield Structure(atoms, number)
