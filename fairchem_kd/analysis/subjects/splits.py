"""The data that models are compared on: opened once, whatever the number of models.

LMDB refuses to open one file twice in a process, so a split is opened for all models together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from fairchem_kd.analysis.subjects.named_data import BESIDE
from fairchem_kd.data.build import check_dataset, ensure_built
from fairchem_kd.data.convert.sources import is_known
from fairchem_kd.errors import UserError
from fairchem_kd.stock.datasets import close_dataset, collate, open_dataset, open_in_order

#: Keys of a dataset's config that choose or make samples: a split given by its path is the whole.
_CHOOSING = (
    "src", "build", "first_n", "sample_n", "max_atoms", "max_atom", "subset_to", "splits",
    "train_split_settings", "val_split_settings", "test_split_settings", "use_train_settings",
)  # fmt: skip
OOD = "test_ood"


@dataclass(frozen=True)
class Split:
    """An open dataset with labels."""

    name: str
    path: str
    dataset: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def loader(self, batch_size: int) -> DataLoader:
        """Batches in the order of the file, read in this process."""
        return DataLoader(self.dataset, batch_size, shuffle=False, collate_fn=collate)


def split_settings(config: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """How a run with this config would read the data at ``path``."""
    train = config.get("dataset") or {}
    left_out = (*_CHOOSING, *BESIDE)
    settings = {key: value for key, value in train.items() if key not in left_out}
    return {**settings, "format": train.get("format", "lmdb"), "src": str(path)}


@contextmanager
def open_split(settings: Mapping[str, Any], name: str = "") -> Iterator[Split]:
    """The split that a dataset's config describes, as long as the block runs.

    Args:
        settings: ``{"format": "lmdb", "src": ...}`` and whatever else fairchem's dataset takes; a
            ``build`` is honoured.
        name: what tables call it; by default the last part of its path.

    Raises:
        UserError: it is missing, empty, or without energies.
    """
    path = str(settings["src"])
    name = name or Path(path).name
    if settings.get("build") is not None:
        ensure_built({"dataset": {"test": dict(settings)}})
    check_dataset(settings, f"the split {name}")
    try:
        dataset = open_in_order(settings, "test")
    except Exception as error:  # whatever a dataset makes of a path that is not for it
        raise UserError(
            f"The split {name} ({path}) cannot be read as format '{settings.get('format')}' "
            f"({type(error).__name__}: {error})."
        ) from error
    try:
        if len(dataset) == 0:
            raise UserError(f"The split {name} ({path}) is empty; name one that has structures.")
        sample = dataset[0]
        if getattr(sample, "energy", None) is None:
            raise UserError(
                f"The split {name} ({path}) has no energies, so there is nothing to compare with; "
                "name one with labels."
            )
        yield Split(name, path, dataset)
    finally:
        close_dataset(dataset.dataset)


def count_structures(settings: Mapping[str, Any]) -> int:
    """How many structures the data set of a config has, ``first_n`` and the like honoured."""
    dataset = open_dataset(settings, "train")
    try:
        return len(dataset)
    finally:
        close_dataset(dataset.dataset)


def given_split(text: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of a split given as ``PATH`` or ``NAME=PATH``.

    Raises:
        UserError: it is of files that ASE reads, where an LMDB is wanted.
    """
    name, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        name, path = "", text
    settings = split_settings(config, path)
    if settings["format"] == "lmdb" and _holds_others(Path(path)):
        raise UserError(
            f"--split {path} is no LMDB, in which this run's data are: `fairchem-kd data convert "
            f"{path} DATA` makes one of it."
        )
    return name or Path(path).name, settings


def _holds_others(path: Path) -> bool:
    """Whether it is, or has, a file of structures, and no LMDB."""
    if path.is_dir():
        return not any(path.glob("*.lmdb")) and any(map(is_known, path.iterdir()))
    return path.is_file() and path.suffix != ".lmdb" and is_known(path)


def splits_of_run(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The splits that a run is judged by: its test set and, beside it, ``test_ood``.

    Without a test set, a ``test`` beside the training set, else the validation set.
    """
    test, val = config.get("test_dataset") or {}, config.get("val_dataset") or {}
    train = config.get("dataset") or {}
    found: dict[str, dict[str, Any]] = {}
    if isinstance(test.get("src"), str):
        found[Path(test["src"]).name] = _settings_of(config, test, "test")
    elif isinstance(train.get("src"), str) and (Path(train["src"]).parent / "test").exists():
        path = Path(train["src"]).parent / "test"
        found["test"] = split_settings(config, path)
    elif isinstance(val.get("src"), str):
        found[Path(val["src"]).name] = _settings_of(config, val, "val")
    for settings in list(found.values()):
        beside = Path(settings["src"]).parent / OOD
        if beside.exists() and OOD not in found:
            found[OOD] = split_settings(config, beside)
    return found


def _settings_of(config: Mapping[str, Any], split: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A run's own test or validation set, with what its config chooses of it."""
    own = {k: v for k, v in split.items() if k not in ("use_train_settings", "transforms")}
    chosen = own.pop(f"{name}_split_settings", None) or {}
    return {**split_settings(config, split["src"]), **own, **chosen}
