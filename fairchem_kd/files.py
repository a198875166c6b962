"""Files on disk: written whole or not at all, and plain values for them."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_whole(
    path: str | Path,
    write: Callable[[BinaryIO], Any],
    *,
    previous: str | Path | None = None,
    before: Callable[[Path], Any] | None = None,
) -> Path:
    """Let ``write`` fill ``path`` so that a crash leaves the old file or the new one, never half.

    The file is written aside in the same folder, flushed to disk and renamed over ``path``; what
    was there before is kept as ``previous`` where that is given. ``before`` is called with the file
    aside once that is whole, and may still refuse it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        if before is not None:
            before(Path(aside))
        if previous is not None:
            _keep(path, Path(previous))
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
    return path


def _keep(path: Path, previous: Path) -> None:
    """Give the file at ``path``, if there is one, the second name ``previous``."""
    aside = previous.with_name(f".{previous.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except FileNotFoundError:
        return
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    os.replace(aside, previous)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain(value: Any) -> Any:
    """Tensors as numbers and lists, paths as text, mappings and sequences through and through."""
    if isinstance(value, torch.Tensor):
        return plain(value.item() if value.numel() == 1 else value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all (see :func:`write_whole`)."""
    return write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write plain values as JSON that every reader takes: no NaN."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, f"{text}\n")
