"""LMDB files looked at before they are mapped: a truncated one ends a process with SIGBUS."""

from __future__ import annotations

import struct
from pathlib import Path

from fairchem_kd.errors import UserError

_MAGIC = 0xBEEFC0DE
_HEADER = 16  # bytes of a page's own header
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map
_PAGE_SIZE, _LAST_PAGE, _TRANSACTION = 24, 120, 128  # from the beginning of the meta data
_LEAST = 2 * 256  # bytes of the smallest file: two meta pages


def is_lmdb(path: Path) -> bool:
    """Whether a file begins as an LMDB does."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER + 4)
    except OSError:
        return False
    return len(head) == _HEADER + 4 and int.from_bytes(head[_HEADER:], "little") == _MAGIC


def check_lmdb(path: Path, where: str) -> None:
    """Refuse a file that is no LMDB, or shorter than it says itself.

    Each file has two pages that say how many pages there are; the one of the later transaction
    counts.

    Args:
        path: the file.
        where: the key that names it, for errors.

    Raises:
        UserError: it is none, or was cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(2 * 65536 + 256)
    except OSError as error:
        raise UserError(f"{where}: {path.absolute()} cannot be read ({error.strerror}).") from None
    first = _meta(head, 0)
    if first is None:
        what = "empty" if not size else "not LMDB"
        if head.startswith(b"SQLite format 3"):
            what = "an SQLite database (ASE's .db: set format: ase_db)"
        raise UserError(
            f"{where}: {path.absolute()} cannot be read as LMDB: it is {what}; it may be truncated "
            "or damaged: copy it again, or name another file."
        )
    page = first[0]
    second = _meta(head, page)
    if second is None:
        raise _damaged(path, where, f"its second page is not LMDB's, of {size:,} bytes")
    last = max((first, second), key=lambda meta: meta[2])[1]
    if (last + 1) * page > size:
        raise _damaged(path, where, f"it has {size:,} bytes and should have {(last + 1) * page:,}")


def _meta(head: bytes, start: int) -> tuple[int, int, int] | None:
    """Page size, last page and transaction out of a meta page; None where it is none."""
    at = start + _HEADER
    if len(head) < at + _TRANSACTION + 8:
        return None
    magic, version, _, _ = _META.unpack_from(head, at)
    page = int.from_bytes(head[at + _PAGE_SIZE : at + _PAGE_SIZE + 4], "little")
    if magic != _MAGIC or version != 1 or not 256 <= page <= 65536 or page & (page - 1):
        return None
    last, transaction = struct.unpack_from("<QQ", head, at + _LAST_PAGE)
    return page, last, transaction


def _damaged(path: Path, where: str, why: str) -> UserError:
    return UserError(
        f"{where}: {path.absolute()} is truncated or damaged ({why}); copy or build it again."
    )
