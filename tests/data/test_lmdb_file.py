"""A damaged LMDB is a sentence, not a SIGBUS or a traceback."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import lmdb
import pytest
from fuzz import chance, rounds

from fairchem_kd.data.build import check_dataset
from fairchem_kd.data.lmdb_file import check_lmdb, is_lmdb
from fairchem_kd.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.0000.lmdb"
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=2**24)
    for number in range(3):  # several transactions: both meta pages are in use
        with environment.begin(write=True) as transaction:
            for key in range(50):
                transaction.put(f"{number}/{key}".encode(), bytes(3000))
    environment.close()
    return path


def test_a_whole_file_is_taken(file: Path) -> None:
    check_lmdb(file, "src")
    assert is_lmdb(file)
    file.write_bytes(file.read_bytes() + bytes(8192))  # room that was not used
    check_lmdb(file, "src")


def test_a_file_that_was_cut_off_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for size in (0, 1, 100, 4096, 8191, 8192, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"src: .*data\.0000\.lmdb .*(truncated|damaged)"):
            check_lmdb(file, "src")
        with pytest.raises(UserError, match=r"dataset\.train\.src: "):
            check_dataset({"format": "lmdb", "src": str(file)}, "dataset.train")


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    connection = sqlite3.connect(path)
    connection.execute("create table systems (id integer)")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match="an SQLite database"):
        check_lmdb(path, "src")
    assert not is_lmdb(path)
    path.write_text("hello" * 5000)
    with pytest.raises(UserError, match="not LMDB"):
        check_lmdb(path, "src")
    with pytest.raises(UserError, match="cannot be read"):
        check_lmdb(tmp_path / "nowhere", "src")


def test_whatever_stands_in_the_first_pages_is_taken_or_refused(file: Path) -> None:
    luck, whole = chance(), file.read_bytes()
    refused = 0
    for _ in range(rounds(300)):
        spoiled = bytearray(whole)
        for _ in range(luck.randint(1, 20)):
            spoiled[luck.randrange(8192)] = luck.randrange(256)
        file.write_bytes(spoiled)
        try:
            check_lmdb(file, "src")
        except UserError:
            refused += 1
    assert 0 < refused < rounds(300)
