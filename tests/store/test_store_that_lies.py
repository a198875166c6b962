"""A store whose index or headers say something else than its records hold: those are not there."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import chance, rounds

from fairchem_kd.store import Column, Reader, Structure, Writer
from fairchem_kd.store.format import CHECKED, ENTRY
from fairchem_kd.teachers.answers import fits

COLUMNS = [
    Column("output:energy", "structure", (1,), "<f8"),
    Column("output:forces", "atom", (3,), "<f8"),
]
NAMES = [column.name for column in COLUMNS]
ATOMS = 3


def structure(seed: int) -> Structure:
    draw = np.random.default_rng(seed)
    return Structure(draw.integers(1, 90, ATOMS), draw.normal(size=(ATOMS, 3)), np.eye(3) * 9)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of six records in one shard."""
    writer = Writer(tmp_path, COLUMNS)
    values = {"output:energy": np.ones(1), "output:forces": np.ones((ATOMS, 3))}
    writer.append([(structure(seed), values) for seed in range(6)])
    writer.close()
    return tmp_path


def shard(store: Path, suffix: str) -> Path:
    return next((store / "shards").glob(f"*.{suffix}"))


def rewritten(store: Path, edit: Callable[[Any], None]) -> None:
    """Change the first entry of the index, as one would who knows its checksum."""
    path = shard(store, "index")
    entries = np.frombuffer(path.read_bytes(), ENTRY).copy()
    edit(entries[:1])
    entries["entry_crc"][0] = zlib.crc32(entries[0].tobytes()[:CHECKED])
    path.write_bytes(entries.tobytes())


def setting(**values: Any) -> Callable[[Any], None]:
    def edit(entry: Any) -> None:
        for name, value in values.items():
            entry[name] = value

    return edit


ENTRIES = {
    "all atoms there are": setting(atoms=2**32 - 1),
    "a few gigabytes": setting(atoms=10**7),
    "more atoms": setting(atoms=ATOMS + 1),
    "fewer atoms": setting(atoms=ATOMS - 1),
    "no atoms": setting(atoms=0),
    "the end of all files": setting(offset=2**64 - 1),
    "beyond what a system can seek": setting(offset=2**63),
    "beyond the end": setting(offset=10**6),
    "another record's place": setting(offset=1),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies(store: Path, name: str) -> None:
    rewritten(store, ENTRIES[name])
    reader = Reader(store)
    found = reader.read(structure(0).key(), NAMES)
    assert found is None
    assert reader.damaged == 1
    assert reader.structure(reader.shards[0], 0) is None
    assert reader.read(structure(1).key(), NAMES) is not None


def test_a_record_of_other_atoms_is_not_taken_for_one_of_these(store: Path) -> None:
    """With every checksum right: only the structure that is asked about tells."""
    path = shard(store, "data")
    columns = Reader(store).shards[0].columns
    contents = path.read_bytes()[: sum(column.size(1) for column in columns)]
    rewritten(store, setting(atoms=1, data_crc=zlib.crc32(contents)))
    found = Reader(store).read(structure(0).key(), NAMES)
    assert found is not None
    assert found["output:forces"].shape == (1, 3)
    assert not fits(found, ATOMS, COLUMNS)
    assert fits(found, 1, COLUMNS)


def test_an_index_with_more_and_with_half_an_entry(store: Path) -> None:
    path = shard(store, "index")
    path.write_bytes(path.read_bytes() + b"\xff" * 100)
    reader = Reader(store)
    assert len(reader) == 8  # two that are damaged, and a part of one
    assert reader.read(structure(5).key(), NAMES) is not None


def column(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["columns"][-1].update(changes)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda header: header.update(format=2),
    "no columns": lambda header: header.pop("columns"),
    "columns of text": lambda header: header.update(columns="abc"),
    "fewer columns": lambda header: header.update(columns=header["columns"][:3]),
    "another order": lambda header: header["columns"].reverse(),
    "a column twice": lambda header: header["columns"].append(header["columns"][-1]),
    "a negative shape": column(shape=[-3]),
    "a shape of nothing": column(shape=[0]),
    "a huge shape": column(shape=[10**9, 10**9]),
    "a shape of text": column(shape="3"),
    "a fraction": column(shape=[1.5]),
    "objects": column(dtype="O"),
    "an array in an array": column(dtype="(1000000000,)<f8"),
    "fields": column(dtype="<f8,<f8"),
    "dates": column(dtype="<M8[s]"),
    "complex": column(dtype="<c16"),
    "no type": column(dtype=None),
    "a list of types": column(dtype=["<f8"]),
    "per year": column(per="year"),
    "no name": column(name=3),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_passed_over(store: Path, name: str) -> None:
    path = shard(store, "json")
    header = json.loads(path.read_text())
    HEADERS[name](header)
    path.write_text(json.dumps(header))
    reader = Reader(store)
    assert reader.strange == [path.stem]
    assert reader.read(structure(0).key(), NAMES) is None


def test_whatever_stands_in_a_shard_is_read_as_written_or_not_at_all(store: Path) -> None:
    """Seeded: bytes anywhere in its three files become others, and files are cut off."""
    luck = chance()
    originals = {suffix: shard(store, suffix).read_bytes() for suffix in ("json", "index", "data")}
    missing = 0
    for _ in range(rounds(400)):
        for suffix, contents in originals.items():
            shard(store, suffix).write_bytes(contents)
        suffix = luck.choice(list(originals))
        changed = bytearray(originals[suffix])
        for _ in range(luck.choice([1, 1, 2, 40])):
            changed[luck.randrange(len(changed))] = luck.choice([0, 1, 127, 128, 255, 48, 57, 45])
        if luck.random() < 0.2:
            del changed[luck.randrange(len(changed)) :]
        shard(store, suffix).write_bytes(changed)
        reader = Reader(store)
        for seed in range(6):
            found = reader.read(structure(seed).key(), NAMES)
            if found is None or not fits(found, ATOMS, COLUMNS):
                missing += 1
            elif suffix != "json":
                assert all((value == 1).all() for value in found.values())
        reader.close()
    assert 0.05 * rounds(400) * 6 < missing < 0.95 * rounds(400) * 6
