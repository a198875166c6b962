"""What both commands do about the terminal, log or pipe that they write to."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable


def on_any_terminal(command: Callable[[], int]) -> int:
    """Run ``command`` so that its output reaches whatever reads it, and return its exit code.

    Letters that the encoding there lacks (``Å`` in ASCII, as some batch systems have it) are
    replaced; a reader that leaves early, as ``| head`` does, ends the command without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be seen to
    except BrokenPipeError:
        if not _stop_writing():
            raise
        return 128 + signal.SIGPIPE  # as of a program that the signal ends: `| head` is no error


def _stop_writing() -> bool:
    """Send what is still to be written nowhere if its reader has gone; whether that was so."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    gone = [output for output, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in gone:
        os.dup2(nowhere, output)
    os.close(nowhere)
    return bool(gone)
