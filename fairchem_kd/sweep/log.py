"""Why a run ended, read off what it printed."""

from __future__ import annotations

import re
from pathlib import Path

#: What begins an attempt in a run's output.
ATTEMPT = "=== fairchem-kd sweep:"
#: submitit and SLURM on jobs that were ended from outside.
_ENDED = re.compile(r"(?:slurmstepd|srun): error: (.*)")


def last_words(log: Path, otherwise: str) -> str:
    """Why a run ended, from the end of its output: its last sentence of ours, or its exception."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return otherwise
    for line in reversed(lines):
        if line.startswith(ATTEMPT):
            break
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if ended := _ENDED.match(line):
            return ended.group(1)[:300]
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line):
            return line[:300]
    return otherwise
