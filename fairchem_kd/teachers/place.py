"""Where a teacher's store is, and its card: whose answers it keeps, and how precise they are."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.files import write_json
from fairchem_kd.machine import FP32, PRECISIONS
from fairchem_kd.reading import read_json, read_json_lines
from fairchem_kd.store.format import CARD, FORMAT
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.text import on_one_line

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


@dataclass(frozen=True)
class Card:
    """What ``store.json`` says."""

    teacher: str  #: the digest of the teacher whose answers are kept
    name: str  #: its file, when the store was made
    features: str  #: the precision of features
    #: by column, how far a structure's answer depends on what shares its batch, or is rounded
    dependence: dict[str, float]
    precision: str = FP32  #: in which the teacher computed

    @classmethod
    def read(cls, folder: Path) -> Card | None:
        """The card of a store; None where there is no store yet.

        Raises:
            UserError: the folder holds something else, or a store of another format.
        """
        path = folder / CARD
        try:
            told = read_json(path)
        except FileNotFoundError:
            # hidden files are of another process that is making the store right now
            if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
                raise UserError(
                    f"task.distillation.teacher.store: {folder} is no store of a teacher's answers "
                    f"(it has no {CARD}): name another folder, which will be made, or 'auto'."
                ) from None
            return None
        except NotADirectoryError:
            if not folder.is_file():
                return None  # somewhere below a file, where nothing can be written
            raise UserError(
                f"task.distillation.teacher.store: {folder} is a file; name a folder, or 'auto'."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"task.distillation.teacher.store: the card {path} cannot be read ({error}): "
                "remove the folder, and what the teacher says will be kept anew."
            ) from None
        if told.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"task.distillation.teacher.store: {folder} has format {told['format']!r:.40}, and "
                f"this fairchem-kd reads {FORMAT}: name another folder, or remove this one."
            )
        try:
            dependence = {str(k): float(v) for k, v in told["dependence"].items()}
            told = {"precision": FP32, **told}
            if told["precision"] not in PRECISIONS:
                raise ValueError(told["precision"])
            if not all(map(math.isfinite, dependence.values())):
                raise ValueError("not finite")
            teacher, name, features = (
                on_one_line(told[key])[:200] for key in ("teacher", "name", "features")
            )
            return cls(teacher, name, features, dependence, told["precision"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"task.distillation.teacher.store: the card {path} is not what a store's is: "
                "remove the folder, and what the teacher says will be kept anew."
            ) from None

    def write(self, folder: Path) -> None:
        """Make the store.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / CARD,
            {
                "format": FORMAT,
                "teacher": self.teacher,
                "name": self.name,
                "precision": self.precision,
                "features": self.features,
                "dependence": dict(self.dependence),
                "written_by": f"fairchem-kd {__version__}",
            },
        )


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
            f"({card.name}), not {live.frozen.name}: name another folder, or 'auto', which has one "
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
