"""Where a teacher's store is, and whether it is this teacher's."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.reading import read_json_lines
from fairchem_kd.store import Card
from fairchem_kd.teachers.live import LiveTeacher

#: The environment variable that names the folder of all stores.
VARIABLE = "FAIRCHEM_KD_STORE"
FOLDER = "teacher_stores"  # beside the runs, where the variable is not set
OFF, AUTO = "off", "auto"


def store_folder(
    given: str, digest: str, features: str, run_dir: str | os.PathLike[str]
) -> Path | None:
    """Where the store of the teacher with this digest is; None where there is to be none.

    Args:
        given: ``auto``, ``off`` or a path.
        digest: of the teacher (`LiveTeacher.digest`).
        features: the precision of features.
        run_dir: the folder in which runs make theirs.
    """
    if given.strip().lower() == OFF:
        return None
    if given.strip().lower() != AUTO:
        return Path(given)
    name = digest[:16] + ("" if features == "fp32" else f"-{features}")
    root = os.environ.get(VARIABLE, "").strip()
    return (Path(root) if root else Path(run_dir) / FOLDER) / name


def check_card(card: Card, live: LiveTeacher, folder: Path, features: str) -> None:
    """Refuse a store of another teacher, or of another precision.

    Raises:
        UserError: it is one.
    """
    if card.precision != live.precision:
        raise UserError(
            f"task.distillation.teacher.store: {folder} keeps what a teacher said that computed in "
            f"{card.precision}, and task.distillation.teacher.precision is {live.precision}: give "
            f"{card.precision}, or name another folder."
        )
    if card.teacher != live.digest:
        raise UserError(
            f"task.distillation.teacher.store: {folder} keeps what another teacher said "
            f"({card.name}), not {live.name}: name another folder, or 'auto', which has one "
            "for each teacher."
        )
    if card.features != features:
        raise UserError(
            f"task.distillation.teacher.store: {folder} keeps features as {card.features}, and "
            f"task.distillation.teacher.store_features is {features}: give {card.features}, or "
            "name another folder."
        )


def writable(folder: Path) -> str:
    """Why nothing can be written there; empty where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def room(folder: Path) -> int:
    """Free bytes where the folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of all files in a store."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # removed meanwhile
            logging.debug(f"{path} went away")
    return sum(sizes)


def marks(folder: Path) -> list[Mapping[str, Any]]:
    """What has been filled in whole (see `filling`), as far as it can be read."""
    try:
        return list(read_json_lines(folder / "filled.jsonl"))
    except (OSError, ValueError):
        return []
