"""Who runs in a folder: two trainings of one name would write over each other.

A record beside the checkpoint, made exclusively and touched by a thread while its owner lives.
Locks of byte ranges would be simpler, and are not to be relied on over NFS and Lustre. A record
that is no longer touched, or whose process is gone, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.processes import process_start, this_process
from fairchem_kd.reading import read_json

OWNER = "owner.json"
BEAT = 10.0  # seconds between two touches
STALE = 60.0  # seconds without a touch after which an owner counts as gone


class Owner:
    """Owns a run's folder for the time of a ``with`` block.

    Args:
        folder: the run's.

    Raises:
        UserError: on entering, another process that lives owns it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / OWNER
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Owner:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{OWNER}.{self._token}.part")
        aside.write_text(json.dumps(_record() | {"token": self._token}), encoding="utf-8")
        try:
            self._claim(aside)
        finally:
            aside.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _claim(self, aside: Path) -> None:
        try:
            os.link(aside, self.path)  # fails where there is one: exclusive on network disks too
            return
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not self.path.exists():
                os.replace(aside, self.path)
                return
        other = _read(self.path)
        with contextlib.suppress(OSError):
            # both times are the disk's own: the clocks of two machines may differ
            age = aside.stat().st_mtime - self.path.stat().st_mtime
            if not _gone(other) and age < STALE:
                raise UserError(_taken(self.path.parent, other, age))
        logging.info(f"{self.path.parent.name} was left by {_who(other)}: going on in its place")
        os.replace(aside, self.path)
        time.sleep(0.05)
        if _read(self.path).get("token") != self._token:  # somebody else did the same
            raise UserError(_taken(self.path.parent, _read(self.path), 0.0))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _record() -> dict[str, Any]:
    return this_process() | {
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _gone(other: dict[str, Any]) -> bool:
    """Whether an owner is known to be gone, without waiting for its record to become stale."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and other.get("job") == job:
        return True  # this very job, requeued
    if other.get("host") != socket.gethostname() or not isinstance(other.get("pid"), int):
        return not other
    try:
        os.kill(other["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return process_start(other["pid"]) != other.get("started")


def _read(path: Path) -> dict[str, Any]:
    try:
        told = read_json(path)
    except (OSError, ValueError):
        return {}
    pid, host = told.get("pid"), told.get("host")
    if type(pid) is not int or not 0 < pid < 1 << 31 or not isinstance(host, str):
        return {}
    return told


def _who(other: dict[str, Any]) -> str:
    words = [f"process {other.get('pid', '?')} on {other.get('host', '?')}"]
    if other.get("job"):
        words.append(f"job {other['job']}")
    if other.get("since"):
        words.append(f"since {other['since']}")
    return ", ".join(words)


def _taken(folder: Path, other: dict[str, Any], age: float) -> str:
    return (
        f"Another training runs in {folder} ({_who(other)}; it last moved {age:.0f} s ago): give "
        "another --timestamp-id or none, or wait for it. If it is gone, start again in a minute."
    )
