"""The format of a store: what is written is read, and what is damaged is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairchem_kd.store import Column, Reader, Structure, Writer

COLUMNS = [
    Column("output:energy", "structure", (1,), "<f8"),
    Column("output:forces", "atom", (3,), "<f8"),
    Column("feature:node:node", "atom", (4,), "<f4"),
]
NAMES = [column.name for column in COLUMNS]


def structure(seed: int, atoms: int = 3) -> Structure:
    draw = np.random.default_rng(seed)
    return Structure(
        draw.integers(1, 90, atoms),
        draw.normal(size=(atoms, 3)),
        np.eye(3) * 9,
        np.array([True, True, False]),
        draw.integers(0, 3, atoms),
    )


def answer(seed: int, atoms: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1000 + seed)
    return {
        "output:energy": draw.normal(size=1) * 1e4,
        "output:forces": draw.normal(size=(atoms, 3)),
        "feature:node:node": draw.normal(size=(atoms, 4)).astype(np.float32),
    }


def write(store: Path, seeds: Any, columns: list[Column] | None = None) -> Writer:
    writer = Writer(store, columns or COLUMNS)
    writer.append([(structure(s, 1 + s % 5), answer(s, 1 + s % 5)) for s in seeds])
    writer.close()
    return writer


def assert_read(reader: Reader, seed: int) -> None:
    found = reader.read(structure(seed, 1 + seed % 5).key(), NAMES)
    assert found is not None
    for name, value in answer(seed, 1 + seed % 5).items():
        assert np.array_equal(found[name], value), name


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    write(tmp_path, range(20, 25))
    reader = Reader(tmp_path)
    assert len(reader) == 25
    for seed in range(25):
        assert_read(reader, seed)
    assert reader.read(structure(99).key(), NAMES) is None


def test_the_reader_of_the_docs(tmp_path: Path) -> None:
    """docs/store.md promises that a few lines of numpy read a store."""
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    write(tmp_path, range(4))
    found: dict[str, Any] = {}
    exec(code, found)
    records = list(found["records"](tmp_path))
    assert len(records) == 4
    for seed, (key, values) in enumerate(records):
        assert key == structure(seed, 1 + seed % 5).key()
        assert np.array_equal(values["output:forces"], answer(seed, 1 + seed % 5)["output:forces"])


@pytest.mark.parametrize(
    "change",
    [
        {"pos": np.ones((3, 3))},
        {"numbers": np.array([1, 1, 2])},
        {"cell": np.eye(3)},
        {"pbc": np.array([True, True, True])},
        {"pbc": None},
        {"tags": None},
        {"tags": np.array([0, 0, 1])},
    ],
)
def test_a_structure_that_changed_has_another_key(change: dict[str, Any]) -> None:
    before = structure(1)
    after = Structure(**{**before.__dict__, **change})
    assert after.key() != before.key()


def test_atoms_are_not_taken_for_those_of_another_order() -> None:
    one = structure(1)
    turned = Structure(one.numbers[::-1], one.pos[::-1], one.cell, one.pbc, one.tags[::-1])
    assert one.key() != turned.key()


def test_columns_may_come_from_several_records(tmp_path: Path) -> None:
    write(tmp_path, range(3), COLUMNS[:2])
    assert Reader(tmp_path).read(structure(1, 2).key(), NAMES) is None
    assert not Reader(tmp_path).has(structure(1, 2).key(), NAMES)
    write(tmp_path, range(3), COLUMNS[2:])
    assert_read(Reader(tmp_path), 1)
    assert Reader(tmp_path).has(structure(1, 2).key(), NAMES)


def test_of_two_records_the_older_one_is_read(tmp_path: Path) -> None:
    write(tmp_path, [1])
    later = Writer(tmp_path, COLUMNS)
    later.append([(structure(1, 2), answer(7, 2))])
    later.close()
    assert_read(Reader(tmp_path), 1)


def test_a_reader_sees_what_is_added_when_it_looks_again(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "nothing yet")
    assert len(reader) == 0
    writer = Writer(tmp_path / "nothing yet", COLUMNS)
    for seed in range(3):
        writer.append([(structure(seed, 1 + seed % 5), answer(seed, 1 + seed % 5))])
        reader.refresh()
        assert_read(reader, seed)
    writer.close()


@pytest.mark.parametrize("suffix", ["data", "index"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, suffix: str) -> None:
    """A damaged record is not read, and the other ones are."""
    write(tmp_path, range(3))
    path = next((tmp_path / "shards").glob(f"*.{suffix}"))
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 37):
        spoiled = bytearray(whole)
        spoiled[place // 8] ^= 1 << place % 8
        path.write_bytes(spoiled)
        reader = Reader(tmp_path)
        read = 0
        for seed in range(3):
            found = reader.read(structure(seed, 1 + seed % 5).key(), NAMES)
            if found is not None:
                read += 1
                assert_read(reader, seed)
        reader.close()
        unused = suffix == "index" and place // 8 % 40 >= 36
        assert read == (3 if unused else 2)


@pytest.mark.parametrize("suffix", ["data", "index"])
def test_what_is_cut_off_is_not_there(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, range(5))
    path = next((tmp_path / "shards").glob(f"*.{suffix}"))
    whole = path.read_bytes()
    for size in range(0, len(whole), 29):
        path.write_bytes(whole[:size])
        reader = Reader(tmp_path)
        for seed in range(5):
            found = reader.read(structure(seed, 1 + seed % 5).key(), NAMES)
            if found is not None:
                assert_read(reader, seed)
        reader.close()


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """No SIGBUS: the record is not there."""
    write(tmp_path, range(5))
    reader = Reader(tmp_path)
    assert_read(reader, 0)
    os.truncate(next((tmp_path / "shards").glob("*.data")), 10)
    assert reader.read(structure(4, 5).key(), NAMES) is None
    assert reader.damaged == 1


OBJECTS = {"name": "x", "per": "atom", "shape": [3], "dtype": "O"}


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "columns": []}',
        json.dumps({"format": 1, "columns": [OBJECTS]}),
    ],
)
def test_a_shard_of_another_kind_is_passed_over(tmp_path: Path, contents: str) -> None:
    write(tmp_path, range(2))
    (tmp_path / "shards" / "000.json").write_text(contents)
    reader = Reader(tmp_path)
    assert reader.strange == ["000"]
    assert_read(reader, 1)


def test_halves_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 1e3
    values[0] = [np.inf, -np.inf, 0.0, -0.0]
    for dtype, like in (("bf16", torch.bfloat16), ("<f2", torch.float16)):
        column = Column("x", "atom", (4,), dtype)
        kept = column.decode(column.encode(values))
        assert np.array_equal(kept, torch.from_numpy(values).to(like).float().numpy())
        assert len(column.encode(values)) == values.nbytes // 2 == column.size(50)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a group: none of the group is there, the rest is."""
    writer = Writer(tmp_path, COLUMNS)
    writer.append([(structure(0, 1), answer(0, 1))])
    real, writer._data = writer._data, Full(writer._data)
    with pytest.raises(OSError, match="No space"):
        writer.append([(structure(1, 2), answer(1, 2))])
    writer._data = real
    writer.append([(structure(2, 3), answer(2, 3))])
    writer.close()
    reader = Reader(tmp_path)
    assert len(reader) == 2
    assert_read(reader, 0)
    assert_read(reader, 2)


class Full:
    """A file on a disk that has room for ten bytes more."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, contents: bytes) -> None:
        self.file.write(contents[:10])
        raise OSError(28, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_many_writers_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write, args=(tmp_path, range(10 * n, 10 * n + 15))) for n in range(4)
    ]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
        assert one.exitcode == 0
    reader = Reader(tmp_path)
    for seed in range(45):
        assert_read(reader, seed)


def write_for_ever(store: Path, begun: Any) -> None:
    writer = Writer(store, COLUMNS)
    for start in range(0, 10**6, 3):
        writer.append(
            [(structure(s, 1 + s % 5), answer(s, 1 + s % 5)) for s in range(start, start + 3)]
        )
        if start == 30:
            begun.set()


@pytest.mark.parametrize("after", [0.0, 0.003, 0.011])
def test_a_writer_that_is_killed_leaves_whole_records(tmp_path: Path, after: float) -> None:
    """SIGKILL, at whatever moment: what is there is right, and another writer goes on."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    child = context.Process(target=write_for_ever, args=(tmp_path, begun))
    child.start()
    assert begun.wait(1200)
    time.sleep(after)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    reader = Reader(tmp_path)
    there = len(reader)
    assert there >= 33
    for seed in range(there):
        assert_read(reader, seed)
    write(tmp_path, range(there, there + 2))
    reader.refresh()
    assert reader.damaged == 0
    assert_read(reader, there + 1)


def test_an_entry_is_as_documented(tmp_path: Path) -> None:
    """Bytes by hand, for those who write the format elsewhere."""
    write(tmp_path, [3])
    shard = tmp_path / "shards"
    entry = next(shard.glob("*.index")).read_bytes()
    record = next(shard.glob("*.data")).read_bytes()
    assert len(entry) == 40
    assert entry[:16] == structure(3, 4).key()
    assert int.from_bytes(entry[16:24], "little") == 0
    assert int.from_bytes(entry[24:28], "little") == 4
    assert int.from_bytes(entry[28:32], "little") == zlib.crc32(record)
    assert int.from_bytes(entry[32:36], "little") == zlib.crc32(entry[:32])
    header = json.loads(next(shard.glob("*.json")).read_text())
    assert [column["name"] for column in header["columns"]][:5] == [
        "numbers", "pos", "cell", "pbc", "tags",
    ]  # fmt: skip
    given = structure(3, 4)
    assert record.startswith(
        given.numbers.astype("u1").tobytes() + given.pos.astype("<f4").tobytes()
    )


def test_an_open_store_takes_memory_for_its_index_alone(tmp_path: Path) -> None:
    """About 100 bytes for a record, whatever it holds; reading keeps nothing."""
    wide = [Column("feature:node:node", "atom", (512,), "<f4")]
    writer, number = Writer(tmp_path, wide), 2000
    values = {"feature:node:node": np.ones((1, 512), np.float32)}
    writer.append([(structure(seed, 1), values) for seed in range(number)])
    writer.close()
    tracemalloc.start()
    try:
        reader = Reader(tmp_path)
        opened, peak = tracemalloc.get_traced_memory()
        assert opened < 120 * number
        assert peak < 300 * number
        for seed in range(0, number, 10):
            assert reader.read(structure(seed, 1).key(), ["feature:node:node"]) is not None
        assert tracemalloc.get_traced_memory()[0] < opened + 20_000
    finally:
        tracemalloc.stop()
