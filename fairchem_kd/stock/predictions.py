"""Stock's predictions, whole: no structure lost, no digit lost."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fairchem.core.common import distutils
from fairchem.core.trainers import BaseTrainer

from fairchem_kd.errors import UserError


def in_single_precision(config: dict[str, Any]) -> bool:
    """Have predictions written as ``float32``, where a config does not say; whether it did not.

    Stock's default is ``float16``: infinite from 65,504 eV on, and in steps of 2 eV at -3,000 eV.
    """
    task, outputs = config.get("task"), config.get("outputs") or {}
    if not isinstance(task, dict | None) or not isinstance(outputs, Mapping):
        return False
    said = [task or {}, *(o for o in outputs.values() if isinstance(o, Mapping))]
    if any("prediction_dtype" in block for block in said):
        return False
    config["task"] = {**(task or {}), "prediction_dtype": "float32"}
    return True


def keep_all_predictions() -> None:
    """Have stock write a prediction for every structure, also of those with equal ids.

    Stock drops all but the first prediction of an id, since several ranks predict some structures
    twice to make their numbers even. Sets of several LMDBs that are numbered from 0 lose structures
    that way. One rank predicts nothing twice, so there equal ids are told apart by a number; with
    several ranks the two cases cannot be told apart, and such a set is refused.
    """
    if getattr(BaseTrainer.save_results, "keeps_all", False):
        return
    original = BaseTrainer.save_results

    @functools.wraps(original)
    def save_results(
        self: BaseTrainer,
        predictions: dict[str, Any],
        results_file: str | None,
        keys: Sequence[str] | None = None,
    ) -> None:
        if results_file is not None and "ids" in predictions:
            ids = [str(one) for one in predictions["ids"]]
            if distutils.get_world_size() == 1:
                predictions["ids"] = apart(ids)
            else:
                _check_ids(self, ids)
        original(self, predictions, results_file, keys)

    save_results.keeps_all = True  # type: ignore[attr-defined]
    BaseTrainer.save_results = save_results


def apart(ids: Sequence[str]) -> list[str]:
    """``ids`` with a number after those that come again: 0_0, 0_0#2, 0_0#3."""
    if len(set(ids)) == len(ids):
        return list(ids)
    taken, seen, unique = set(ids), Counter[str](), []
    for one in ids:
        seen[one] += 1
        name = one if seen[one] == 1 else f"{one}#{seen[one]}"
        while seen[one] > 1 and name in taken:
            seen[one] += 1
            name = f"{one}#{seen[one]}"
        taken.add(name)
        unique.append(name)
    repeated = sum(count > 1 for count in Counter(ids).values())
    logging.warning(
        f"{repeated} ids stand for several structures (such as {ids[0]!r}): the later ones are "
        "written as ID#2, ID#3, in the order of the data set."
    )
    return unique


def _check_ids(trainer: BaseTrainer, ids: Sequence[str]) -> None:
    """Refuse a set whose ids are fewer than its structures.

    Raises:
        UserError: on every rank.
    """
    everywhere = distutils.gather_objects(list(ids))
    told = [""]
    dataset = getattr(trainer, "test_dataset", None)
    if distutils.is_master() and dataset is not None:
        found = {one for of_rank in everywhere for one in of_rank}
        if len(found) < len(dataset) <= sum(map(len, everywhere)):
            told[0] = (
                f"The test set has {len(dataset)} structures and {len(found)} ids (sid and fid), "
                "so that predictions of several ranks cannot be told apart: predict with one rank, "
                "or write other ids into the data."
            )
    distutils.broadcast_object_list(told, src=0, device=trainer.device)
    if told[0]:
        raise UserError(told[0])
