"""Typed options: what is coerced, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fairchem_kd.errors import UserError
from fairchem_kd.schema import option, parse


@dataclass
class Inner:
    steps: int = option(0, ge=0)


@dataclass
class Options:
    path: str = option()
    rate: float = option(1.0, gt=0, le=10)
    on: bool = option(True)
    mode: str | None = option(None, choices=("fast", "slow"))
    inner: Inner = option(factory=Inner)
    names: list[str] | None = option(None)


def test_command_line_strings_are_read_as_what_they_spell() -> None:
    given = {"path": "x", "rate": "1e-4", "on": "false", "mode": "null", "inner": {"steps": "5"}}
    assert parse(Options, given, "w") == Options("x", 1e-4, False, None, Inner(5), None)


def test_defaults() -> None:
    assert parse(Options, {"path": "x"}, "w") == Options("x")
    assert parse(Inner, None, "w") == parse(Inner, "null", "w") == Inner()


def test_a_list_from_the_command_line() -> None:
    assert parse(Options, {"path": "x", "names": "[H, Cu]"}, "w").names == ["H", "Cu"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "w.path is required"),
        ({"path": "x", "rat": 1}, "unknown key 'rat' (did you mean 'rate'?)"),
        ({"path": "x", "rate": "fast"}, "w.rate must be a number, not 'fast'"),
        ({"path": "x", "rate": True}, "w.rate must be a number"),
        ({"path": "x", "rate": float("nan")}, "w.rate must be a number"),
        ({"path": "x", "rate": 0}, "w.rate must be greater than 0, not 0"),
        ({"path": "x", "rate": 11}, "w.rate must be at most 10"),
        ({"path": "x", "on": 3}, "w.on must be true or false"),
        ({"path": "x", "mode": "fst"}, "w.mode cannot be 'fst' (did you mean 'fast'?)"),
        ({"path": "x", "inner": {"steps": 1.5}}, "w.inner.steps must be a whole number"),
        ({"path": "x", "inner": {"steps": -1}}, "w.inner.steps must be at least 0"),
        ({"path": "x", "inner": 3}, "w.inner must be a mapping"),
        ({"path": 3}, "w.path must be text"),
        ({"path": "x", "names": 3}, "w.names must be a list"),
        ({"path": "x", "names": [1]}, "w.names[0] must be text"),
        (3, "w must be a mapping"),
    ],
)
def test_what_does_not_fit_is_refused(given: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Options, given, "w")
    assert words in str(error.value)
