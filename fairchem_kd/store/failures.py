"""Structures of which a teacher could say nothing, named in a file of the store.

A calculator may fail on some structures: a self-consistent field that does not converge, an element
that it lacks. They are not asked again unless that is wanted, and do not count in a training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairchem_kd.json_file import read_json_lines

FAILED = "failed.jsonl"


def note_failure(folder: Path, key: bytes, told: Mapping[str, Any]) -> None:
    """Note that nothing could be said of the structure with this key.

    Args:
        told: why, and whatever else helps to find it.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps({"key": key.hex(), **told}, ensure_ascii=False)
    with (folder / FAILED).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def failures(folder: Path) -> dict[bytes, dict[str, Any]]:
    """What is noted, by the structure's key; lines that a crash cut off are left out."""
    found = {}
    try:
        for line in read_json_lines(folder / FAILED):
            try:
                found[bytes.fromhex(line["key"])] = line
            except (KeyError, TypeError, ValueError):
                continue
    except (OSError, ValueError):
        return {}
    return found
