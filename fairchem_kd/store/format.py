"""The format of a store of teachers' answers, and the writing of it: numpy alone.

A store is a folder whose files are only ever appended to:

    store.json              the card: which teacher, how precise
    shards/NAME.json        the columns of a shard, and the format's version
    shards/NAME.data        its records, one after the other: the bytes of all columns in order
    shards/NAME.index       one `ENTRY` of 40 bytes for each record

A shard has one writer: processes and jobs that fill one store each append to a shard of their own,
so that no locks are needed on a cluster's file system. An index entry is written after its record;
a record without one does not exist. Both are checksummed, so that what a crash or a disk has
spoiled is found when it is read. docs/store.md has a reader of a few lines.

A record is known by its structure (:meth:`Structure.key`): one that changed has another key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
#: Of a shard with columns of edges. The rest of the store is as before, and code that knows format
#: 1 alone passes over such a shard.
EDGE_FORMAT = 2
CARD = "store.json"
SHARDS = "shards"

Array = NDArray[Any]

#: Of each record: its structure's key, where its bytes start, how many atoms it has, the CRC-32 of
#: its bytes and of the 32 bytes of the entry before it, and how many edges it has (0 in shards of
#: format 1; with a wrong number the bytes do not have their CRC).
ENTRY = np.dtype(
    {
        "names": ["key", "offset", "atoms", "data_crc", "entry_crc", "edges"],
        "formats": [("u1", 16), "<u8", "<u4", "<u4", "<u4", "<u4"],
        "offsets": [0, 16, 24, 28, 32, 36],
        "itemsize": 40,
    }
)
CHECKED = 32  # bytes of an entry that entry_crc is of


@dataclass(frozen=True)
class Column:
    """One quantity of a record.

    ``(*shape)`` of a structure, ``(N, *shape)`` of its N atoms or ``(E, *shape)`` of its E edges.
    """

    name: str
    per: Literal["structure", "atom", "edge"]
    shape: tuple[int, ...]
    dtype: str  #: a little-endian numpy type, or ``bf16``: the upper half of a ``<f4``

    def size(self, atoms: int, edges: int = 0) -> int:
        """Its bytes in a record of so many atoms and edges."""
        return {"structure": 1, "atom": atoms, "edge": edges}[self.per] * self._row

    @cached_property
    def _row(self) -> int:
        """Its bytes for one atom, for one edge, or for the structure."""
        return math.prod(self.shape) * self.stored.itemsize

    @cached_property
    def stored(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.dtype == "bf16" else self.dtype)

    def encode(self, values: Array) -> bytes:
        """The bytes of ``(*shape)``, ``(N, *shape)`` or ``(E, *shape)``."""
        if self.dtype == "bf16":  # to the nearest, ties to even
            bits = np.ascontiguousarray(values, "<f4").view("<u4")
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            values = np.where(np.isfinite(values), rounded >> 16, bits >> 16)
        return np.ascontiguousarray(values, self.stored).tobytes()

    def decode(self, contents: bytes | memoryview) -> Array:
        """``(*shape)``, ``(N, *shape)`` or ``(E, *shape)``; halves as ``float32``."""
        values = np.frombuffer(contents, self.stored)
        if self.dtype == "bf16":
            values = (values.astype("<u4") << 16).view("<f4")
        elif self.dtype == "<f2":
            values = values.astype("<f4")
        own = self.per == "structure"
        return values.reshape(self.shape) if own else values.reshape(-1, *self.shape)


#: What every record holds of its structure, so that it can be asked again; pbc and tags are -1
#: where the structure does not say.
STRUCTURE = (
    Column("numbers", "atom", (), "<u1"),
    Column("pos", "atom", (3,), "<f4"),
    Column("cell", "structure", (3, 3), "<f4"),
    Column("pbc", "structure", (3,), "<i1"),
    Column("tags", "atom", (), "<i4"),
)


@dataclass(frozen=True)
class Structure:
    """What a model sees of N atoms."""

    numbers: Array  #: atomic numbers, ``(N,)``
    pos: Array  #: Å, ``(N, 3)``, to the precision of ``float32``
    cell: Array  #: Å, ``(3, 3)``
    pbc: Array | None = None  #: ``(3,)``; None where nobody says
    tags: Array | None = None  #: 0 below the surface, 1 surface, 2 adsorbate, ``(N,)``

    def columns(self) -> dict[str, Array]:
        """Its values under the names of `STRUCTURE`."""
        tags = np.full(len(self.numbers), -1) if self.tags is None else self.tags
        return {
            "numbers": np.asarray(self.numbers, "<u1"),
            "pos": np.asarray(self.pos, "<f4"),
            "cell": np.asarray(self.cell, "<f4").reshape(3, 3),
            "pbc": np.asarray(np.full(3, -1) if self.pbc is None else self.pbc, "<i1").reshape(3),
            "tags": np.asarray(tags, "<i4"),
        }

    def key(self) -> bytes:
        """16 bytes: BLAKE2b of N (8 bytes, little-endian) and the columns' bytes in order."""
        digest = hashlib.blake2b(len(self.numbers).to_bytes(8, "little"), digest_size=16)
        values = self.columns()
        for column in STRUCTURE:
            digest.update(column.encode(values[column.name]))
        return digest.digest()


class Writer:
    """Appends records to a shard of its own; the shard begins with the first record.

    Args:
        store: the store's folder, which exists.
        columns: what each record holds beside its structure.
    """

    def __init__(self, store: str | os.PathLike[str], columns: Sequence[Column]) -> None:
        self.columns = (*STRUCTURE, *columns)
        self.folder = Path(store) / SHARDS
        host = "".join(c for c in socket.gethostname() if c.isalnum())[:20]
        # in the order in which they began: of two records of one structure the older one is read
        self.name = f"{time.time_ns():020d}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._data: Any = None
        self._index: Any = None
        self._end = 0
        self._records = 0

    @property
    def format(self) -> int:
        return EDGE_FORMAT if any(column.per == "edge" for column in self.columns) else FORMAT

    def size(self, atoms: int, edges: int = 0) -> int:
        """The bytes of a record of so many atoms and edges, its index entry included."""
        return sum(column.size(atoms, edges) for column in self.columns) + ENTRY.itemsize

    def append(self, records: Sequence[tuple[Structure, Mapping[str, Array]]]) -> None:
        """Add records: each a structure, and its values by column.

        Raises:
            OSError: they could not be written, for a full disk say; nothing of them stays.
            KeyError, ValueError: a column is missing or has another shape.
        """
        contents, entries = [], np.zeros(len(records), ENTRY)
        end = self._end
        for entry, (structure, values) in zip(entries, records, strict=True):
            record = self._encode(structure, values)
            entry["key"] = np.frombuffer(structure.key(), "u1")
            entry["offset"], entry["atoms"] = end, len(structure.numbers)
            entry["edges"] = self.edges_of(values)
            entry["data_crc"] = zlib.crc32(record)
            entry["entry_crc"] = zlib.crc32(entry.tobytes()[:CHECKED])
            contents.append(record)
            end += len(record)
        try:
            self._open()
            self._data.write(b"".join(contents))
            self._data.flush()
            self._index.write(entries.tobytes())
            self._index.flush()
        except OSError:
            self._undo()
            raise
        self._end = end
        self._records += len(records)

    def close(self) -> None:
        """Leave what was written to the disk's care."""
        for file in (self._data, self._index):
            if file is not None and not file.closed:
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def edges_of(self, values: Mapping[str, Array]) -> int:
        """The edges of a record with these values."""
        found = (len(values[column.name]) for column in self.columns if column.per == "edge")
        return next(found, 0)

    def _encode(self, structure: Structure, values: Mapping[str, Array]) -> bytes:
        given = {**structure.columns(), **values}
        rows = {"structure": (), "atom": (len(structure.numbers),)}
        rows["edge"] = (self.edges_of(values),)
        parts = []
        for column in self.columns:
            value = np.asarray(given[column.name])
            shape = (*rows[column.per], *column.shape)
            if value.shape != shape:
                raise ValueError(f"{column.name} has the shape {value.shape}, not {shape}")
            parts.append(column.encode(value))
        return b"".join(parts)

    def _open(self) -> None:
        if self._data is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # unbuffered: what could not be written is not tried again when the file is closed
        self._data = (self.folder / f"{self.name}.data").open("wb", buffering=0)
        self._index = (self.folder / f"{self.name}.index").open("wb", buffering=0)
        header = {"format": self.format, "columns": [asdict(column) for column in self.columns]}
        aside = self.folder / f".{self.name}.part"
        aside.write_text(json.dumps(header))
        os.replace(aside, self.folder / f"{self.name}.json")  # readers look for this one

    def _undo(self) -> None:
        """Cut off what was written in part."""
        ends = ((self._data, self._end), (self._index, self._records * ENTRY.itemsize))
        for file, end in ends:
            if file is not None:
                file.truncate(end)
                file.seek(end)
