"""Text and JSON that someone else may have written, or a crash cut off; the standard library alone.

What is read is a regular file of a size that such a file may have, of plain values that are not
nested without end, and text that can be written again; everything else is an :class:`Unreadable`
of a few words, to which the caller adds which file that is, what for, and what to do.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_JSON = 64_000_000  # bytes of a card, a manifest or a table of ours
MAX_LINE = 16_000_000  # bytes of a record; the longest holds a run's config
MAX_DEPTH = 60
MAX_DIGITS = 40  # of a whole number: a float has no more than 17 that count


class Unreadable(ValueError):
    """Why a file is not what it should be, in a few words."""


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a regular file, UTF-8.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it is too large, no regular file, or no text.
    """
    with opened(path) as file:
        # no more than there is: what is asked for is set aside before it is read
        contents = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(contents) > limit:
        raise Unreadable(f"it has more than {limit:,} bytes")
    try:
        return contents.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} of it is not UTF-8") from None


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it is not JSON, holds something else than keys and values, or is too large.
    """
    value = parse_json(read_text(path, limit))
    if not isinstance(value, dict):
        raise Unreadable("it holds no keys with values")
    return value


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file that are keys and values in JSON; others, of a crash say, are left out.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it is no regular file.
    """
    with opened(path) as file:
        while line := file.readline(MAX_LINE):
            try:
                value = parse_json(line.decode())
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def parse_json(text: str) -> Any:
    """The value that a text stands for.

    Raises:
        Unreadable: it is not JSON, has a key twice, or what no file of ours holds.
    """
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_once)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"it is more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise Unreadable(f"it is not JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        check_unicode(json.dumps(value, ensure_ascii=False))
    return value


def opened(path: str | os.PathLike[str]) -> Any:
    """A regular file, open to read bytes: a pipe would wait for somebody to write."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise Unreadable("it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("it is no regular file")
    return Path(path).open("rb")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise Unreadable(f"it has a number of {len(text):,} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"it has the key '{twice[:60]}' twice")
    return made


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is more than {MAX_DEPTH} levels deep")
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("it has half a character, which no text does") from None
