"""Cards and other small files: read within bounds, or refused in a few words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz import chance, rounds

from fairchem_kd.npz import array_headers, read_array
from fairchem_kd.reading import (
    MAX_DEPTH,
    Unreadable,
    parse_json,
    parse_yaml,
    read_json,
    read_json_lines,
    read_text,
)

CARD = {"format": 1, "elements": ["H", 6], "units": {"energy": "eV"}, "n": 1.5, "none": None}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    assert read_json(tmp_path / "card.json") == CARD
    assert parse_yaml(yaml.safe_dump(CARD)) == CARD
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}}") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": 1},
    }  # fmt: skip
    assert parse_json(json.dumps("\U0001f600")) == "\U0001f600"


def test_a_size_is_a_bound_and_not_a_guess(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 10)
    assert read_text(tmp_path / "a", 10) == "x" * 10
    with pytest.raises(Unreadable, match="more than 9 bytes"):
        read_text(tmp_path / "a", 9)
    with pytest.raises(Unreadable, match="no regular file"):
        read_text("/dev/zero", 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unreadable, match="no regular file"):
        read_json(tmp_path / "pipe")


def test_depth_is_bounded() -> None:
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        inside = MAX_DEPTH - 1
        assert parse_json(opened * inside + "1" + closed * inside)
        for depth in (MAX_DEPTH + 1, 500, 100_000):
            with pytest.raises(Unreadable, match="levels deep"):
                parse_json(opened * depth + "1" + closed * depth)


def test_a_key_that_stands_twice_contradicts_itself() -> None:
    for text in ("a: 1\nb: 2\na: 3", "b:\n  - {a: 1, a: 1}", '{"a": 1, a: 2}'):
        with pytest.raises(Unreadable, match="has the key 'a' twice"):
            parse_yaml(text)
    assert parse_yaml("x: {<<: {a: 1}, <<: {b: 2}, a: 3}\n1: 2\n'1': 3")["x"]["a"] == 3


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"", b"[]", b'{"a":', b"\xff\xfe", b"[" * 9999, b'{"a": 2}', b'{"a": 3']
    (tmp_path / "lines").write_bytes(b"\n".join(lines))
    assert [one["a"] for one in read_json_lines(tmp_path / "lines")] == [1, 2]


def test_whatever_stands_in_a_card_is_read_or_refused(tmp_path: Path) -> None:
    """Seeded: any byte of a card, a config and an archive becomes another one, or is cut off."""
    luck = chance()
    np.savez(tmp_path / "a.npz", natoms=np.arange(40), sid=np.arange(40))
    texts = [json.dumps(CARD), yaml.safe_dump(CARD), (tmp_path / "a.npz").read_bytes()]
    refused = 0
    for number in range(rounds(1500)):
        text = texts[number % 3]
        changed = bytearray(text.encode() if isinstance(text, str) else text)
        for _ in range(luck.choice([1, 1, 3, 10])):
            changed[luck.randrange(len(changed))] = luck.randrange(256)
        if luck.random() < 0.2:
            del changed[luck.randrange(len(changed)) :]
        path = tmp_path / "changed"
        path.write_bytes(changed)
        try:
            if number % 3 == 0:
                assert isinstance(read_json(path), dict)
            elif number % 3 == 1:
                parse_yaml(changed.decode())
            else:
                for name in array_headers(path):
                    assert len(read_array(path, name)) == 40
        except (Unreadable, UnicodeDecodeError):
            refused += 1
    assert 0.2 * rounds(1500) < refused < rounds(1500)
