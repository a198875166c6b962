"""Extended xyz looked at before it is read: ASE reads as many lines as a frame says it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fairchem_kd.errors import UserError

SUFFIXES = (".xyz", ".extxyz")


def frames_of(file: Path) -> Iterator[int]:
    """Where each frame begins, in bytes.

    Raises:
        UserError: a frame begins with something else than a number of atoms, or has more of them
            than the file has room for.
    """
    size = file.stat().st_size
    with open(file, "rb") as lines:
        frame = 0
        while True:
            offset = lines.tell()
            head = lines.readline()
            if not head:
                return
            if not head.strip():  # between frames, or after the last
                continue
            count = atoms_of(head, file, frame)
            if count > size - lines.tell():  # each atom has a line
                raise too_few(file, frame, count)
            yield offset
            for _ in range(count + 1):
                lines.readline()
            frame += 1


def check_xyz(file: Path) -> None:
    """Refuse a file whose frames say that they have more atoms than it could hold.

    Raises:
        UserError: naming the frame.
    """
    for _ in frames_of(file):
        pass


def atoms_of(head: str | bytes, file: Path, frame: int) -> int:
    """The number of atoms that the first line of a frame says.

    Raises:
        UserError: it says none.
    """
    try:
        count = int(head)
    except ValueError:
        count = -1
    if count < 0:
        shown = head.decode(errors="replace") if isinstance(head, bytes) else head
        raise UserError(
            f"{file} is not extended xyz: frame {frame} begins with {shown.strip()[:40]!r} instead "
            "of a number of atoms; mend the file, or leave it out."
        )
    return count


def too_few(file: Path, frame: int, count: int) -> UserError:
    return UserError(
        f"{file} is truncated in frame {frame}, which says that it has {count:,} atoms; copy or "
        "download it again, or mend that line."
    )
