"""What a sweep's manifest holds, field by field.

Its digest tells edits by hand, not who wrote it: a run's name becomes paths, and its arguments
words of a command, so each is what `fairchem-kd sweep` would have written, or the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FORMAT = 1
#: What the command line gives and what does make another run: each with its flag.
FLAGS = {"seed": "--seed", "checkpoint": "--checkpoint", "amp": "--amp"}

_NAME = re.compile(r"[0-9a-f]{10}")
_TEXT = 4096  # characters of a label, a key or an argument


def check_contents(contents: Mapping[str, Any]) -> None:
    """Refuse what is no manifest.

    Raises:
        ValueError: naming the field.
    """
    if contents.keys() != {"format", "sweep", "directory", "runs", "digest"}:
        raise ValueError("it has other keys")
    if type(contents["format"]) is not int or contents["format"] < 1:
        raise ValueError("format is no version")
    for key in ("sweep", "directory"):
        _check_text(contents[key], key)
    if not isinstance(contents["runs"], list):
        raise ValueError("runs is not a list")
    names: set[str] = set()
    for number, run in enumerate(contents["runs"]):
        _check_run(run, f"runs[{number}]")
        if run["name"] in names:
            raise ValueError(f"runs has {run['name']} twice")
        names.add(run["name"])


def _check_run(run: Any, where: str) -> None:
    needed, known = {"name", "values", "seed"}, {"label", "arguments", "listed"}
    if not isinstance(run, dict) or not needed <= run.keys() <= needed | known:
        raise ValueError(f"{where} has other keys than a run's")
    if not isinstance(run["name"], str) or not _NAME.fullmatch(run["name"]):
        raise ValueError(f"{where}.name is no hash of ten digits")
    if not isinstance(run["values"], dict):
        raise ValueError(f"{where}.values is no mapping of keys")
    for key in run["values"]:
        _check_text(key, f"a key of {where}.values")
    if type(run["seed"]) is not int:
        raise ValueError(f"{where}.seed is no whole number")
    _check_text(run.get("label", ""), f"{where}.label")
    if not isinstance(run.get("listed", True), bool):
        raise ValueError(f"{where}.listed is neither true nor false")
    _check_arguments(run.get("arguments", []), f"{where}.arguments")


def _check_arguments(arguments: Any, where: str) -> None:
    """The flags that a run's config gives, each at most once, with a value that is no flag."""
    if not isinstance(arguments, list):
        raise ValueError(f"{where} is not a list")
    for word in arguments:
        _check_text(word, where)
    left = list(arguments)
    for key, flag in FLAGS.items():
        if left[:1] != [flag]:
            continue
        left.pop(0)
        value = left[0] if left else ""
        if key == "seed" and not re.fullmatch(r"-?\d+", value):
            raise ValueError(f"{where} has {flag} without a number")
        if left and (key == "seed" or not value.startswith("--")):
            left.pop(0)
    if left:
        raise ValueError(f"{where} has {left[0]!r:.60}, which no sweep gives")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > _TEXT or not value.isprintable():
        raise ValueError(f"{where} is no text on one line")
