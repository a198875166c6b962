"""The models that are to be compared: where they are, what they were trained with, their weights.

Any fairchem 1.x checkpoint will do, of a run or exported, ours or stock's. Files are read without
executing code (see :mod:`fairchem_kd.models.file`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import torch

from fairchem_kd.analysis.subjects.named_data import outside, unpickled
from fairchem_kd.distillation.config import named_in
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.legacy import modern_config
from fairchem_kd.reading import read_json
from fairchem_kd.schema import is_null
from fairchem_kd.text import on_one_line
from fairchem_kd.training.records import RECORDS, read_records

#: What a run's folder holds, best first.
OF_A_RUN = ("best_checkpoint.pt", "checkpoint.pt")
TRUST = "if you trust where it comes from, give --trust"


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint, and what its config says; the weights stay on disk until they are loaded."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    trust: bool = False

    @property
    def identifier(self) -> str:
        """What a user would call it: the run's identifier, or the name of an exported file."""
        if self.path.name not in OF_A_RUN:
            return self.path.stem
        named = (self.config.get("cmd") or {}).get("identifier")
        return on_one_line(named or self.path.parent.name)

    @property
    def seed(self) -> int | None:
        return (self.config.get("cmd") or {}).get("seed")

    @property
    def losses(self) -> list[str]:
        """The names of the distillation terms it was trained with; none for plain training."""
        given = (_distillation(self.config).get("losses")) or {}
        return [name for name, term in given.items() if not is_null(term) and _coefficient(term)]

    @property
    def teacher(self) -> str | None:
        """The path of the teacher that it was distilled from; None of an ensemble."""
        teacher = _distillation(self.config).get("teacher") or {}
        path = teacher.get("checkpoint")
        if (several := named_in(path)) is not None:
            path = several[0] if len(several) == 1 else None
        return None if is_null(path) or not self.losses else str(path)

    @property
    def has_teachers(self) -> bool:
        """Whether it was distilled from an ensemble."""
        given = (_distillation(self.config).get("teacher") or {}).get("checkpoint")
        return len(named_in(given) or ()) > 1 and bool(self.losses)

    @property
    def labels_from(self) -> str | None:
        """Where its training set is, as its config has it."""
        return (self.config.get("dataset") or {}).get("src")

    @property
    def recipe(self) -> str:
        """Its training apart from the seed: two files of one recipe are seeds of one model."""
        keys = ("model", "optim", "task", "outputs", "loss_functions", "dataset")
        known = {key: self.config.get(key) for key in keys}
        return json.dumps([self.path.name, known], sort_keys=True, default=str)

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Lines of the ``records.jsonl`` beside it; none where there is no such file."""
        return read_records(self.path.parent, kind) if self.in_run else []

    @property
    def in_run(self) -> bool:
        """Whether it lies in the folder of a run, beside that run's records."""
        return self.path.name in OF_A_RUN and (self.path.parent / RECORDS).is_file()

    def check_data(self, settings: Any, mend: str) -> None:
        """Refuse to open data that only this file names, where the user cannot have meant it.

        Samples of an LMDB are pickles, so a file must not choose which are opened: those of a run
        are the user's own, and otherwise they have to lie below the current directory.

        Args:
            settings: the config of the data set in the file, all of it.
            mend: what to do where they are meant.

        Raises:
            UserError: they lie elsewhere.
        """
        if self.trust:
            return
        if (key := unpickled(settings)) is not None:
            raise UserError(
                f"{self.path} names a file for its data ({key}) that fairchem unpickles, which can "
                f"run code: {mend}."
            )
        if self.in_run:
            return
        if (place := outside(settings)) is not None:
            raise UserError(
                f"{self.path} names its own data, {place[:200]!r}, outside the current directory, "
                f"and samples of an LMDB are pickles, which can run code: if these are meant, "
                f"{mend}."
            )
        source = settings.get("src") if isinstance(settings, Mapping) else settings
        told = on_one_line(f"{self.path} names its own data: opening {source}")
        print(told, file=sys.stderr)

    @property
    def training_seconds(self) -> float | None:
        """Wall time of the training loop, evaluations included, by its records; None without."""
        if self.path.name not in OF_A_RUN:
            told = self.card.get("training_seconds")
            if isinstance(told, bool) or not isinstance(told, int | float):
                return None
            return float(told) if 0 <= told < math.inf else None
        total = last = 0.0
        for record in self.records():
            seconds = float(record["seconds"])
            if seconds < last:  # a resumed run starts its clock anew: the parts add up
                total += last
            last = seconds
        return (total + last) or None

    @property
    def card(self) -> dict[str, Any]:
        """The card beside an exported checkpoint; empty where there is none that can be read."""
        try:
            return read_json(self.path.with_suffix(".json"))
        except (OSError, ValueError):
            return {}


def _distillation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    block = (config.get("task") or {}).get("distillation")
    return block if isinstance(block, Mapping) else {}


def _coefficient(term: Any) -> bool:
    """Whether a term of ``losses`` takes part: its coefficient is not 0."""
    if not isinstance(term, Mapping):
        return True
    try:
        return float(term.get("coefficient", 1)) != 0
    except (TypeError, ValueError):
        return True


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the best one of a run's folder.

    A folder that was given as --run-dir to one run alone will do, too.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        return path  # the reader says it if it is missing
    for name in OF_A_RUN:
        if (path / name).is_file():
            return path / name
    within = [p for name in OF_A_RUN for p in path.glob(f"checkpoints/*/{name}")]
    if within and all(p.parent == within[0].parent for p in within):
        return within[0]
    runs = sorted(p.parent.name for p in path.glob(f"*/{OF_A_RUN[0]}"))
    hint = f"; it holds the runs {', '.join(runs[:4])}" if runs else ""
    raise UserError(
        f"The folder {path} has neither {OF_A_RUN[0]} nor {OF_A_RUN[1]}: name the folder of a run "
        f"that saved one, and leave out or remove those that ended before they did{hint}."
    )


def read_model(path: str | Path, *, trust: bool = False) -> ModelFile:
    """What the checkpoint or run's folder ``path`` says of its model.

    Raises:
        UserError: it is missing or no fairchem 1.x checkpoint.
    """
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        known = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]
        near = did_you_mean(path.name, known)
        near = near if "did you mean" in near else ""
        raise UserError(f"{path} does not exist in {Path.cwd()}{near}; name a run or a checkpoint.")
    found = find_checkpoint(path)
    config = read_checkpoint(found, trust=trust, hint=TRUST)["config"]
    return ModelFile(found, modern_config(config), trust)


def load_model(file: ModelFile, device: torch.device | str = "cpu") -> Any:
    """The model of ``file``, frozen, with its (EMA) weights, normalisers and references.

    Returns:
        A :class:`fairchem_kd.models.frozen.Teacher`, whatever its role here.

    Raises:
        UserError: it cannot be built from its own config, or the weights do not fit.
    """
    from fairchem_kd.models.build import build_model, read_units
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.models.units import Units
    from fairchem_kd.random_state import isolated_random_state

    contents = read_checkpoint(file.path, trust=file.trust, hint=TRUST)
    with isolated_random_state():
        model = build_model(contents, str(file.path)).to(device)
    units = Units(*read_units(contents, device))
    return Teacher(model, units, file.config["outputs"], name=str(file.path))


def read_named(runs: Sequence[str], *, trust: bool) -> list[tuple[str | None, ModelFile]]:
    """What each ``[LABEL=]RUN`` names: its label, where it has one, and its file.

    With a label, RUN may be a pattern (``e2n=checkpoints/*-e2n-s?``), which shells leave as it is.
    """
    from fairchem_kd.analysis.subjects.runs import read_model

    named = [(label, one) for label, path in map(_split_label, runs) for one in _matching(path)]
    return [(label, read_model(path, trust=trust)) for label, path in named]


def _matching(path: Path) -> list[Path]:
    """What a pattern matches, in order; a path that is none as it is."""
    if path.exists() or not any(mark in str(path) for mark in "*?["):
        return [path]
    found = [Path(name) for name in sorted(glob(str(path)))]
    if not found:
        raise UserError(f"Nothing in {Path.cwd()} matches {path}; name runs that are there.")
    return found


def _split_label(text: str) -> tuple[str | None, Path]:
    """Label and path of ``[LABEL=]RUN``; a path that has an ``=`` of its own is a path."""
    label, separator, path = text.partition("=")
    if not separator or Path(text).exists() or "/" in label:
        return None, Path(text)
    if not label or not path:
        raise UserError(f"'{text}' is no run: write LABEL=RUN, or RUN alone.")
    return label, Path(path)
