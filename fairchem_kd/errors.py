"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
import errno
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


def of_disk(error: OSError) -> UserError:
    """A disk's refusal in one sentence: full, read-only, no such folder, ...

    Raises:
        OSError: the error itself, where it names no file and is none of a disk that is full.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if error.filename is None and not full:
        raise error
    where = "a file" if error.filename is None else str(error.filename)
    mend = "make room" if full else "name another place, or mend its permissions"
    return UserError(
        f"{where} cannot be read or written ({error.strerror}): {mend}; what was written before is "
        "whole."
    )


def report(error: UserError) -> int:
    """Print what the user can mend on stderr, and return the exit code 2."""
    print(f"error: {in_lines(error)}", file=sys.stderr)
    return 2
