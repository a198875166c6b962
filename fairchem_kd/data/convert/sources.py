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
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.io.trajectory import Trajectory

from fairchem_kd.data.lmdb_file import is_lmdb
from fairchem_kd.data.xyz_file import atoms_of, frames_of, too_few
from fairchem_kd.errors import UserError

XYZ = (".xyz", ".extxyz")
TRAJECTORY = (".traj",)
DATABASE = (".db", ".aselmdb")
#: Other files that a folder is searched for; a single file, or --pattern, may name any.
OTHERS = (".xtd", ".cfg", ".gen")
#: VASP's, also those of several runs: OUTCAR.1, OUTCAR_relax2, vasprun.xml.static.
_VASP = re.compile(r"(?:.*[._-])?(OUTCAR|vasprun\.xml)(?:[._-][\w-]+)*")
_VASP_FORMATS = {"OUTCAR": "vasp-out", "vasprun.xml": "vasp-xml"}
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
        files = sorted(files_below(source, pattern))
        if pattern is None:
            files = [file for file in files if is_known(file)]
        if not files:
            what = f"no file that matches {pattern}" if pattern else "no file of structures in it"
            raise UserError(
                f"The folder {source} has {what} (.extxyz, .xyz, .traj, .db, OUTCAR, vasprun.xml, "
                "also .xz, .gz and .bz2): name another folder, or give --pattern '*.EXT'."
            )
        found += files
    if len(set(found)) < len(found):
        twice = next(str(file) for file in found if found.count(file) > 1)
        raise UserError(f"{twice} is given twice; name every file once.")
    return found


def files_below(folder: Path, pattern: str | None = None) -> Iterator[Path]:
    """The files in a folder and all below it, also behind links; each place once.

    Args:
        folder: where they are.
        pattern: of names, or of the last parts of paths; None: all.
    """
    been: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in been:
            folders.clear()  # a link to where we come from
            continue
        been.add(real)
        folders.sort()
        for name in names:
            file = Path(place) / name
            if name.startswith(".") or not file.is_file():
                continue
            if pattern is None or file.relative_to(folder).match(pattern):
                yield file


def passed_over(sources: Iterable[Path], found: Iterable[Path]) -> list[Path]:
    """The files in the sources' folders that are not among those that were found."""
    known = {file.resolve() for file in found}
    known |= {log_of(file).resolve() for file in found}
    return [
        file
        for source in sources
        if source.is_dir()
        for file in sorted(files_below(source))
        if file.resolve() not in known
    ]


def is_known(file: Path) -> bool:
    """Whether its name is that of a file of structures, as far as a folder is searched for them."""
    bare = _bare(file)
    if bare.suffix in (*XYZ, *TRAJECTORY, *DATABASE) or bare.name.endswith(OTHERS):
        return True
    return _VASP.fullmatch(bare.name) is not None


def _bare(file: Path) -> Path:
    """The file's name without the suffix of a compression."""
    return file.with_suffix("") if file.suffix in _OPENERS else file


def _bare_suffix(file: Path) -> str:
    """The suffix without that of a compression."""
    return _bare(file).suffix


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
    if kind == "database" and is_lmdb(file):
        raise UserError(
            f"{file} is an LMDB and no database of ASE's: it is a data set already (format: lmdb); "
            "if it is ASE's in LMDB, call it .aselmdb."
        )
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
    starts = enumerate(frames_of(file))
    return [(frame, offset) for frame, offset in starts if frame % FRAMES_PER_PART == 0]


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
        count = atoms_of(head, part.file, frame)
        body: list[str] = []
        while len(body) <= count and (line := text.readline()):
            body.append(line)
        # without atoms, the comment may be blank
        if len(body) <= count or (count and not body[-1].strip()):
            raise too_few(part.file, frame, count)
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
        for key, value in (row.data or {}).items():  # where some keep their labels
            if np.shape(value)[:1] == (len(atoms),) and np.ndim(value) > 1:
                atoms.arrays.setdefault(key, np.asarray(value))
            else:
                atoms.info.setdefault(key, value)
        yield Structure(atoms, number)


def _read_any(part: Part) -> Iterator[Structure]:
    vasp = _VASP.fullmatch(_bare(part.file).name)
    format_ = _VASP_FORMATS[vasp.group(1)] if vasp else None
    with _plain(part.file) as path:
        for number, atoms in enumerate(ase.io.iread(path, index=":", format=format_)):
            yield Structure(atoms, number)


@contextmanager
def _plain(file: Path) -> Iterator[str]:
    """The path of a file that is not compressed: of a compressed one, of a copy in the block."""
    opener = _OPENERS.get(file.suffix)
    if opener is None:
        yield str(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / _bare(file).name
        with opener(file, "rb") as packed, copy.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        yield str(copy)
