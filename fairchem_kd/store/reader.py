"""Reading a store: which records there are, and what they hold.

Records are read with ``pread`` rather than through a memory map: both take them from the page
cache, but a map of a file that is cut short meanwhile, as on a network's file system, ends the
process with SIGBUS, where a short read is a record that is not there.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairchem_kd.json_file import read_json
from fairchem_kd.store.format import (
    CHECKED,
    EDGE_FORMAT,
    ENTRY,
    FORMAT,
    SHARDS,
    STRUCTURE,
    Array,
    Column,
    Structure,
)


class Shard:
    """One shard: its columns, its index as far as it has been read, and its records.

    Raises:
        ValueError: its header is none of this format.
        OSError: it cannot be read.
    """

    def __init__(self, header: Path) -> None:
        told = read_json(header)
        if told.get("format") not in (FORMAT, EDGE_FORMAT):
            raise ValueError("another format")
        self.columns = [_column(one) for one in told["columns"]]
        edges = any(column.per == "edge" for column in self.columns)
        if edges != (told["format"] == EDGE_FORMAT):
            raise ValueError("columns of another format")
        self.names = frozenset(column.name for column in self.columns)
        if (*self.columns[: len(STRUCTURE)],) != STRUCTURE or len(self.names) < len(self.columns):
            raise ValueError("other columns than a structure's, or one of them twice")
        self.name = header.stem
        self._index_path = header.with_suffix(".index")
        self._data_path = header.with_suffix(".data")
        self.entries = np.zeros(0, ENTRY)
        self._file = -1

    def refresh(self) -> bool:
        """Read the index entries that have come since; whether there were any."""
        try:
            size = self._index_path.stat().st_size // ENTRY.itemsize * ENTRY.itemsize
        except OSError:
            return False
        known = len(self.entries) * ENTRY.itemsize
        if size <= known:
            return False
        with self._index_path.open("rb") as file:
            file.seek(known)
            contents = file.read(size - known)
        whole = len(contents) // ENTRY.itemsize
        self.entries = np.concatenate([self.entries, np.frombuffer(contents, ENTRY, count=whole)])
        return whole > 0

    def record(self, row: int) -> memoryview | None:
        """The bytes of a record; None where it is damaged or cut off."""
        entry = self.entries[row]
        if zlib.crc32(entry.tobytes()[:CHECKED]) != entry["entry_crc"]:
            return None
        size = sum(column.size(*self._rows(row)) for column in self.columns)
        offset = int(entry["offset"])
        try:
            if self._file < 0:
                self._file = os.open(self._data_path, os.O_RDONLY | os.O_NONBLOCK)
            if offset + size > os.fstat(self._file).st_size:
                return None  # cut off; an entry may claim any number of atoms
            contents = os.pread(self._file, size, offset)
        except (OSError, OverflowError):
            return None
        if len(contents) != size or zlib.crc32(contents) != entry["data_crc"]:
            return None
        return memoryview(contents)

    def values(self, row: int, wanted: Iterable[str]) -> dict[str, Array] | None:
        """Some columns of a record; None where it is damaged or cut off."""
        record = self.record(row)
        if record is None:
            return None
        values, start, rows = {}, 0, self._rows(row)
        for column in self.columns:
            stop = start + column.size(*rows)
            if column.name in wanted:
                values[column.name] = column.decode(record[start:stop])
            start = stop
        return values

    def _rows(self, row: int) -> tuple[int, int]:
        """How many atoms and edges a record has."""
        return int(self.entries[row]["atoms"]), int(self.entries[row]["edges"])

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": -1}  # another process opens it for itself


def _column(told: Any) -> Column:
    """A column of a header.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    column = Column(told["name"], told["per"], tuple(told["shape"]), told["dtype"])
    whole = (
        isinstance(column.name, str)
        and column.per in ("structure", "atom", "edge")
        and isinstance(column.dtype, str)
        and _DTYPE.fullmatch(column.dtype)
        and all(type(extent) is int and 0 < extent <= _WIDEST for extent in column.shape)
    )
    if not whole or math.prod(column.shape) > _WIDEST:
        raise ValueError(f"a column of another kind: {column}")
    return column


_DTYPE = re.compile(r"bf16|[<|][iu]1|<[iu][248]|<f[248]")
_WIDEST = 1 << 24  # values of a column, of one atom or structure


@dataclass
class _Family:
    """The records of all shards with the same columns, sorted by the first half of their keys."""

    names: frozenset[str]
    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    shard: NDArray[np.int32]
    row: NDArray[np.int64]

    def places(self, key: bytes) -> Iterator[tuple[int, int]]:
        """Shard and row of every record with this key, the oldest shard first."""
        first, second = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self.first, first))
        while place < len(self.first) and self.first[place] == first:
            if self.second[place] == second:
                yield int(self.shard[place]), int(self.row[place])
            place += 1


class Reader:
    """The records of a store, as they were at the last :meth:`refresh`.

    Args:
        store: its folder; a folder that is empty or not there is an empty store.
    """

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self.folder = Path(store) / SHARDS
        self._shards: dict[str, Shard] = {}
        self._strange: set[str] = set()
        self._families: list[_Family] = []
        self._numbered: list[Shard] = []  # as the families number them
        self.damaged = 0  #: records that were found damaged by this reader
        self.refresh()

    def __len__(self) -> int:
        return sum(len(shard.entries) for shard in self._shards.values())

    @property
    def shards(self) -> list[Shard]:
        """The oldest first."""
        return [self._shards[name] for name in sorted(self._shards)]

    @property
    def strange(self) -> list[str]:
        """Shards that are passed over: another format, or a damaged header."""
        return sorted(self._strange)

    def refresh(self) -> None:
        """See what other writers have added."""
        changed = False
        try:
            found = sorted(path for path in self.folder.glob("*.json") if path.name[0] != ".")
        except OSError:
            return
        for path in found:
            if path.stem not in self._shards and path.stem not in self._strange:
                try:
                    self._shards[path.stem] = Shard(path)
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    self._strange.add(path.stem)
                    continue
            if path.stem in self._shards:
                changed |= self._shards[path.stem].refresh()
        if changed:
            self._families = self._sorted()

    def _sorted(self) -> list[_Family]:
        members: dict[frozenset[str], list[tuple[int, Shard]]] = {}
        self._numbered = self.shards
        for number, shard in enumerate(self._numbered):
            members.setdefault(shard.names, []).append((number, shard))
        families = []
        for names, shards in members.items():
            keys = np.concatenate([s.entries["key"] for _, s in shards]).copy().view("<u8")
            numbers = np.concatenate([np.full(len(s.entries), n, np.int32) for n, s in shards])
            row = np.concatenate([np.arange(len(s.entries)) for _, s in shards])
            order = np.argsort(keys[:, 0], kind="stable")  # the oldest shard stays first
            families.append(
                _Family(names, keys[order, 0], keys[order, 1], numbers[order], row[order])
            )
        return families

    def read(self, key: bytes, wanted: Sequence[str]) -> dict[str, Array] | None:
        """Columns of the structure with this key; None where one of them is not to be had.

        They may come from several records: outputs from one, a feature from a later one.
        """
        left = set(wanted)
        values: dict[str, Array] = {}
        for family in self._families:
            if not left & family.names:
                continue
            for number, row in family.places(key):
                found = self._numbered[number].values(row, left)
                if found is None:
                    self.damaged += 1
                    continue
                values |= found
                left -= family.names
                break
            if not left:
                return values
        return None if left else values

    def has(self, key: bytes, wanted: Sequence[str]) -> bool:
        """Whether all of the columns are to be had, as far as the index says."""
        left = set(wanted)
        for family in self._families:
            if left & family.names and any(True for _ in family.places(key)):
                left -= family.names
        return not left

    def structure(self, shard: Shard, row: int) -> Structure | None:
        """The structure of a record; None where it is damaged."""
        values = shard.values(row, ("numbers", "pos", "cell", "pbc", "tags"))
        if values is None:
            return None
        pbc, tags = values["pbc"], values["tags"]
        return Structure(
            values["numbers"],
            values["pos"],
            values["cell"],
            None if (pbc < 0).any() else pbc,
            None if (tags < 0).any() else tags,
        )

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
