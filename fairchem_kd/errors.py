"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from fairchem_kd.text import in_lines


class UserError(ValueError):
    """A wrong config, file, dataset or pairing of models.

    Its message is one sentence or two: what is wrong, where (file and key), and what to do.
    The commands print it without a traceback and exit with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a near miss, else ``; known: a, b, c``."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f"; known: {', '.join(known)}" if known else ""


def report(error: UserError) -> int:
    """Print what the user can mend on stderr, and return the exit code 2."""
    print(f"error: {in_lines(error)}", file=sys.stderr)
    return 2
