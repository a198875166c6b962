"""The card of a store: whose answers it keeps, and how precise they are; standard library alone.

A teacher is known by a digest, so that what one says is never read for what another would have
said. Of an ASE calculator the card also tells how it is made, so that it can be asked again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.json_file import read_json
from fairchem_kd.store.format import CARD, FORMAT
from fairchem_kd.text import on_one_line

#: Of a calculator, which computes as it was made to.
OWN = "own"
#: In which a teacher may have computed; the first one where a card does not say.
COMPUTED = ("fp32", "tf32", "bf16", OWN)
_KEPT = 200  # characters of a name


@dataclass(frozen=True)
class Card:
    """What ``store.json`` says."""

    teacher: str  #: the digest of the teacher whose answers are kept
    name: str  #: its file, when the store was made; or its factory
    features: str  #: the precision of features
    #: by column, how far a structure's answer depends on what shares its batch, or is rounded
    dependence: Mapping[str, float]
    precision: str = COMPUTED[0]  #: in which the teacher computed
    #: of an ASE calculator how it was made: ``factory``, ``arguments``, ``versions``, ``features``
    calculator: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, where: str = "task.distillation.teacher.store") -> Card | None:
        """The card of a store; None where there is no store yet.

        Args:
            where: the option or key that names the folder, for errors.

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
                    f"{where}: {folder} is no store of a teacher's answers "
                    f"(it has no {CARD}): name another folder, which will be made, or 'auto'."
                ) from None
            return None
        except NotADirectoryError:
            if not folder.is_file():
                return None  # somewhere below a file, where nothing can be written
            raise UserError(f"{where}: {folder} is a file; name a folder, or 'auto'.") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where}: the card {path} cannot be read ({error}): "
                "remove the folder, and what the teacher says will be kept anew."
            ) from None
        if told.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{where}: {folder} has format {told['format']!r:.40}, and "
                f"this fairchem-kd reads {FORMAT}: name another folder, or remove this one."
            )
        try:
            return cls._of(told)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{where}: the card {path} is not what a store's is: "
                "remove the folder, and what the teacher says will be kept anew."
            ) from None

    @classmethod
    def _of(cls, told: Mapping[str, Any]) -> Card:
        dependence = {str(k): float(v) for k, v in told["dependence"].items()}
        if not all(map(math.isfinite, dependence.values())):
            raise ValueError("not finite")
        precision, calculator = told.get("precision", COMPUTED[0]), told.get("calculator")
        if precision not in COMPUTED:
            raise ValueError(precision)
        if calculator is not None:
            told_well = (
                isinstance(calculator["factory"], str)
                and isinstance(calculator["arguments"], dict)
                and isinstance(calculator.get("features", {}), dict)
            )
            if not told_well:
                raise ValueError("a calculator of another kind")
        teacher, name, features = (
            on_one_line(told[key])[:_KEPT] for key in ("teacher", "name", "features")
        )
        return cls(teacher, name, features, dependence, precision, calculator)

    def write(self, folder: Path) -> None:
        """Make the store.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "format": FORMAT,
            "teacher": self.teacher,
            "name": self.name,
            "precision": self.precision,
            "features": self.features,
            "dependence": dict(self.dependence),
            "written_by": f"fairchem-kd {__version__}",
        }
        if self.calculator is not None:
            told["calculator"] = dict(self.calculator)
        aside = folder / f".{CARD}.{os.getpid()}.part"
        with aside.open("w", encoding="utf-8") as file:
            file.write(f"{json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False)}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, folder / CARD)
