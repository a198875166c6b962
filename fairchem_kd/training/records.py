"""A run's own record: one JSON object per line beside its checkpoint, whatever the logger."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.files import plain
from fairchem_kd.reading import read_json_lines

RECORDS = "records.jsonl"


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        """Of the processor, for all threads of this process."""
        return time.process_time() - self._cpu


class Records:
    """Appends lines to ``records.jsonl``; a resumed run goes on in the same file.

    Each line has ``kind`` (``config``, ``train``, ``val``, ..., ``end``) and ``seconds`` since this
    process began to train, setting up included, beside what is given to :meth:`write`;
    ``cpu_seconds`` is the processor's time of all its threads meanwhile, which other work on the
    machine changes less. A line cut
    off by a crash is ended before the next one, so that :func:`read_records` loses that line alone.

    Args:
        folder: the run's, made where it does not exist.
        began: when the training did; now where it is None.

    Raises:
        UserError: a line cannot be written, e.g. for a full disk.
    """

    def __init__(self, folder: str | os.PathLike[str], began: Clock | None = None) -> None:
        self.path = Path(folder) / RECORDS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._start = began or Clock()
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    @property
    def seconds(self) -> float:
        """Since this process began to train."""
        return self._start.seconds

    def write(self, kind: str, **values: Any) -> None:
        times = {"seconds": round(self.seconds, 3)}
        times["cpu_seconds"] = round(self._start.cpu_seconds, 3)
        line = json.dumps({"kind": kind, **times, **plain(values)}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}): make room, then start the "
                f"same command again with --timestamp-id {self.path.parent.name}."
            ) from error


def read_records(folder: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's checkpoint folder, those of one kind if asked for.

    Lines that are none, of a crash or of another program, are passed over.
    """
    return [
        record
        for record in read_json_lines(Path(folder) / RECORDS)
        if _is_record(record) and (kind is None or record["kind"] == kind)
    ]


def _is_record(value: dict[str, Any]) -> bool:
    """Whether a line is what :meth:`Records.write` writes of a training."""
    kind, metrics, step = value.get("kind"), value.get("metrics", {}), value.get("step", 0)
    if not isinstance(kind, str) or not isinstance(metrics, dict) or not _is_number(step):
        return False
    needed = {"config": ("config",), "val": ("step", "metrics")}
    return (
        all(key in value for key in needed.get(kind, ()))
        and _is_number(value.get("seconds"))
        and isinstance(step, int)
        and step >= 0
        and _is_number(value.get("epoch", 0.0))
        and isinstance(value.get("config", {}), dict)
        and all(name.isprintable() for name in metrics)
        and all(one is None or _is_number(one) for one in metrics.values())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
