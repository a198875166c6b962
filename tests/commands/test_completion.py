"""The script by which a shell completes the command: in a real bash, and without torch."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

import pytest

from fairchem_kd.commands.completion import script
from fairchem_kd.commands.main import main

_ASK = """
COMP_WORDS=({words}); COMP_CWORD={last}; _fairchem_kd; echo "${{COMPREPLY[*]}}"
"""


@pytest.fixture(scope="module")
def made() -> str:
    """The script of bash; what prints it imports neither torch nor fairchem."""
    told = (
        "import sys; from fairchem_kd.commands.main import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'fairchem'} & set(sys.modules); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", told, "--completion", "bash"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["c"], "cka compare configs cost"),
        (["data", ""], "slabs collisions convert pool"),
        (["data", "slabs", "--re"], "--references"),
        (["report", "RUN", "--with", "p"], "physics"),
        (["accept", "--method", ""], "auto emt xtb none"),
        (["compare", "structures"], ""),  # files, which the shell knows
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers_what_fits(made: str, line: list[str], offered: str) -> None:
    words = " ".join(f"'{word}'" for word in ("fairchem-kd", *line))
    asked = made + _ASK.format(words=words, last=len(line))
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert [one for one in done.stdout.split() if one not in ("-h", "--help")] == offered.split()


def test_what_a_shell_takes_literally_is_quoted() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=("a$b", "it's"))
    for shell in ("bash", "zsh"):
        text = script(parser, shell)
        assert "bashcompinit" in text if shell == "zsh" else "bashcompinit" not in text
        assert """words='a$b it'"'"'s'""" in text


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--completion", "tcsh"])
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
