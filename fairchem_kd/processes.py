"""Whether a process of this machine is still the one that noted its number."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What tells this process from every other, as far as that can be told."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's own count: its number may come again.

    None where that is not known, and of one that has ended and that its parent has not yet noticed.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold blanks
    return None if fields[0] in "ZX" else fields[19]
