"""Normalisers and references of a config: stock reads what it knows, and passes over the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.schema import read_value
from fairchem_kd.stock.option_table import mapping, refuse_near_misses

_KINDS = ("normalizer", "element_references")
_NORMALIZER = ("mean", "rmsd", "stdev", "file", "fit", "batch_size", "shuffle", "num_batches")


def check_normalizer(normalizer: dict[str, Any], where: str) -> None:
    """Check the normalisers of a split, and coerce their numbers in place.

    Raises:
        UserError: one that is none, by its key.
    """
    where = f"{where}.transforms.normalizer"
    if "file" in normalizer or "fit" in normalizer:
        return
    for target, values in normalizer.items():
        here = f"{where}.{target}"
        values = mapping(values, here)
        if "file" in values:
            continue
        for old in ("std", "rms"):
            if old in values:
                raise UserError(f"{here} has an unknown key '{old}' (did you mean 'rmsd'?).")
        refuse_near_misses(values, _NORMALIZER, here)
        if "mean" not in values or not {"rmsd", "stdev"} & set(values):
            raise UserError(f"{here} needs mean and rmsd; it has {', '.join(values) or 'nothing'}.")
        for key in ("mean", "rmsd", "stdev"):
            if key in values:
                positive = {"gt": 0} if key != "mean" else {}
                values[key] = read_value(float, values[key], f"{here}.{key}", positive)


def check_transforms(splits: Any, targets: Sequence[str]) -> None:
    """Refuse normalisers and references that stock would pass over without a word.

    Args:
        splits: the config's ``dataset``.
        targets: names of outputs, as far as the config has them.

    Raises:
        UserError: the near miss of an output's name, or those of another split than train, which
            are not read, where they are not the same.
    """
    if not isinstance(splits, Mapping):
        return

    def of(split: str) -> Mapping[str, Any]:
        transforms = (splits.get(split) or {}).get("transforms")
        return transforms if isinstance(transforms, Mapping) else {}

    refuse_near_misses(of("train"), _KINDS, "dataset.train.transforms")
    for kind in _KINDS:
        own = of("train").get(kind)
        where = f"dataset.train.transforms.{kind}"
        if isinstance(own, Mapping) and targets:
            refuse_near_misses(own, [*targets, "file", "fit"], where)
        for split in ("val", "test"):
            if of(split).get(kind) and of(split)[kind] != own:
                raise UserError(
                    f"dataset.{split}.transforms.{kind} is not read, and not what {where} is, "
                    "which goes for all sets: take it out, or give it there."
                )
