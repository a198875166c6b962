"""The teacher speaks once, before the demo's trainings, so that its time is none of theirs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from fairchem_kd.demo.children import (
    CONFIG,
    DONE,
    LOG,
    POLL,
    STORE,
    environment,
    signals_raised,
    stop,
    tail,
)
from fairchem_kd.demo.plan import teacher_digest
from fairchem_kd.errors import UserError
from fairchem_kd.files import write_text
from fairchem_kd.reading import read_json

FOLDER = "teach"

_COMMAND = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"


def teach(config: Mapping[str, Any], out: Path, lock: int) -> float:
    """Keep all that a training asks of its teacher; returns the seconds that this took.

    They are of the processor on a CPU, of the clock on a GPU, and those of the first time where it
    was done before.

    Args:
        config: of the training that asks for the most.
        out: the demo's folder.
        lock: of `children.claimed`.

    Raises:
        UserError: it failed; the last lines are told.
        Interrupted: by a signal; it is stopped.
    """
    folder = out / FOLDER
    content = json.dumps([config, teacher_digest(config)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    before = _done(folder, digest)
    if before is not None and (out / STORE).is_dir():
        print(f"the teacher: asked before, {before:.0f} s", file=sys.stderr)
        return before
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
    command = [sys.executable, "-c", _COMMAND, "teach", str(folder / CONFIG)]
    print("the teacher is asked about every structure, once", file=sys.stderr)
    began = time.perf_counter()
    with open(folder / LOG, "wb") as log, signals_raised() as requests:
        with requests.held():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(out),
                start_new_session=True,
                pass_fds=(lock,),
            )
        try:
            status, usage = None, None
            while status is None:
                time.sleep(POLL)
                pid, code, used = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    status, usage = os.waitstatus_to_exitcode(code), used
            process.returncode = status
        finally:
            stop([process])
    assert usage is not None
    if status != 0:
        raise UserError(
            f"The teacher could not be asked (exit code {status}). Mend it and start again. The "
            f"last lines of {folder / LOG}:\n  {tail(folder / LOG)}"
        )
    taken = usage.ru_utime + usage.ru_stime
    if torch.cuda.is_available():
        taken = time.perf_counter() - began
    write_text(folder / DONE, json.dumps({"seconds": taken, "digest": digest}) + "\n")
    print(f"the teacher: done in {taken:.0f} s", file=sys.stderr)
    return taken


def _done(folder: Path, digest: str) -> float | None:
    try:
        content = read_json(folder / DONE)
        return float(content["seconds"]) if content["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
