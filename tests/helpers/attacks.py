"""The real commands on files that lie: each in a fork of this process, within bounds, and judged.

A command that hangs, dies, takes gigabytes or prints a traceback has not held.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd.commands import main as kd

SECONDS = 120  # of CPU
MEMORY = 4 << 30  # bytes beyond what this process has mapped


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int  # negative: killed by that signal
    out: str
    err: str

    def sentence(self, *words: str) -> str:
        """The one sentence that it was refused with, which has these words."""
        assert self.code == 2, f"exit code {self.code}:\n{self.out[-1500:]}\n{self.err[-3000:]}"
        assert "Traceback" not in self.err, self.err[-3000:]
        found = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.err[-3000:]
        assert len(found[0]) < 1000, found[0]
        for word in words:
            assert word in found[0], f"{word!r} is not in {found[0]!r}"
        return found[0]

    def went_on(self) -> None:
        """It ended well."""
        assert self.code == 0, f"exit code {self.code}:\n{self.err[-3000:]}"
        assert "Traceback" not in self.err, self.err[-3000:]


def run(argv: Sequence[str], cwd: Path, command: Callable[..., Any] = kd.main) -> Said:
    """``fairchem-kd ARGV`` in the folder ``cwd``."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(argv, cwd, command, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Said(code, *texts)


def _child(argv: Sequence[str], cwd: Path, command: Callable[..., Any], out: int, err: int) -> None:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(cwd)
        warnings.resetwarnings()  # which are errors in tests, and none in a command
        warnings.simplefilter("ignore")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(8 * SECONDS)  # of a machine that does other things as well
        code = command(list(argv)) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
