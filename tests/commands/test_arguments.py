"""How the commands parse: positional arguments on both sides of a flag, and bounds of numbers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairchem_kd.commands import main as cli
from fairchem_kd.commands.arguments import Parser, at_least, more_than
from fairchem_kd.errors import UserError, of_disk


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["data", "convert", "A", "B", "--into", "train", "DEST"],
            {"sources": [Path("A"), Path("B")], "into": "train", "dest": Path("DEST")},
        ),
        (
            ["data", "convert", "--seed", "1", "A", "--force", "DEST", "--cell", "9"],
            {"sources": [Path("A")], "dest": Path("DEST"), "seed": 1, "force": True, "cell": 9.0},
        ),
        (["compare", "a", "--no-plots", "b"], {"runs": ["a", "b"], "no_plots": True}),
        (["report", "a", "--cpu", "b", "-o", "c", "d"], {"runs": ["a", "b", "d"]}),
        (["physics", "a", "--fmax", "1", "b"], {"runs": ["a", "b"], "fmax": 1.0}),
        (["cost", "a", "--repeats", "3", "b"], {"runs": [Path("a"), Path("b")], "repeats": 3}),
        (["cka", "--pair", "a:b", "--student", "s", "--pair", "c:d"], {"pair": ["a:b", "c:d"]}),
        (["export", "a.pt", "--force", "b.pt"], {"checkpoint": Path("a.pt"), "dest": Path("b.pt")}),
        (["features", "m", "--out", "o", "s"], {"model": Path("m"), "structures": Path("s")}),
        (["sweep", "run", "--cpu", "s.yml", "--workers", "2"], {"cpu": True, "workers": 2}),
        (["inspect", "--json", "--", "-odd.pt"], {"model": Path("-odd.pt"), "json": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_may_stand_between_positional_arguments(
    argv: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remember(args: argparse.Namespace) -> int:
        assert {name: getattr(args, name) for name in expected} == expected
        return 7

    monkeypatch.setattr(f"{cli.COMMANDS[argv[0]].module}.run", remember)
    assert cli.main(argv) == 7


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (at_least(1), "0", "must be at least 1, not 0."),
        (at_least(0), "-1", "must be at least 0, not -1."),
        (at_least(1), "1.5", "must be a whole number that is at least 1, not '1.5'."),
        (at_least(0.0), "-0.5", "must be at least 0, not -0.5."),
        (at_least(0.0), "nan", "must be at least 0, not nan."),
        (more_than(0), "0", "must be more than 0, not 0."),
        (more_than(0.0), "0", "must be more than 0, not 0."),
        (more_than(0.0), "inf", "must be more than 0, not inf."),
        (more_than(0.0), "x", "must be a number that is more than 0, not 'x'."),
    ],
)
def test_a_number_out_of_range_is_a_sentence_with_the_flag(
    kind: Callable[[str], float], text: str, said: str
) -> None:
    parser = Parser()
    parser.add_subparsers().add_parser("command").add_argument("--number", type=kind)
    with pytest.raises(UserError) as refused:
        parser.parse_args(["command", f"--number={text}"])
    assert str(refused.value) == f"--number {said}"


def test_a_number_out_of_range_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "slabs", "--processes", "0"]) == 2
    assert capsys.readouterr().err == "error: --processes must be at least 1, not 0.\n"


def test_a_number_in_range_is_of_its_kind() -> None:
    assert at_least(1)("1") == 1
    assert isinstance(at_least(0.0)("2"), float)
    assert more_than(0.0)("1e-3") == 1e-3


def test_other_errors_are_argparses_own(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="command")
    parser.add_argument("words", nargs="+")
    parser.add_argument("--choice", choices=("a",))
    for argv, said in (
        (["x", "--choice", "b"], "argument --choice: invalid choice: 'b'"),
        ([], "required: words"),
        (["x", "--other"], "unrecognized arguments: --other"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(argv)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("usage: command ")
        assert "words [words ...]" in error
        assert said in error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "out/a.md"), "out/a.md cannot be .*make room"),
        (OSError(28, "No space left on device"), "a file cannot be .*No space left"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x cannot be .*another place"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b cannot be"),
    ],
)  # fmt: skip
def test_what_a_disk_refuses_is_a_sentence(error: OSError, said: str) -> None:
    assert re.search(said, str(of_disk(error)))


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error")])
def test_other_errors_are_no_sentence(error: OSError) -> None:
    with pytest.raises(OSError, match=r"Broken pipe|I/O error"):
        of_disk(error)
