"""The way to a conservative student by a short second training, after one with direct forces.

The first training has a head for forces and is several times cheaper; the second one starts from
its weights without that head, and takes forces from the energy (``task.conservative``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from fairchem_kd.models.build import build_model
from fairchem_kd.models.legacy import modern
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.conservative import is_conservative

#: Keys of a `model` block that do not say which weights there are, or are what is to change.
_APART = ("regress_forces", "direct_forces", "otf_graph", "scale_file")


def without_force_head(
    checkpoint: dict[str, Any], config: Mapping[str, Any], own: Collection[str], path: str
) -> dict[str, Any]:
    """A checkpoint of the same model with direct forces, as one of ``config``'s to begin from.

    The averaged (EMA) weights, where it has any, and nothing of its optimiser, schedule or step:
    those are of other parameters. Any other checkpoint is returned as it is.

    Args:
        checkpoint: as it was read.
        config: of the training that begins.
        own: the names of its model's weights.
        path: where the checkpoint is, for errors and the log.
    """
    if not is_conservative(config) or is_conservative(checkpoint["config"]):
        return checkpoint
    theirs = modern(checkpoint, path)["config"]["model"]
    if not theirs.get("regress_forces", True) or not theirs.get("direct_forces", True):
        return checkpoint
    if _apart(theirs) != _apart(config["model"]):
        return checkpoint  # of another model: its weights will not fit, which is refused by name
    with isolated_random_state():
        weights = build_model(checkpoint, path).state_dict()
    if set(weights) <= set(own):
        return checkpoint
    logging.info(
        f"{path} has a head for forces, which is left out: from here on forces are the slope of "
        "the energy, and step, optimiser and schedule begin anew."
    )
    kept = {key: checkpoint.get(key) for key in ("normalizers", "elementrefs", "config", "amp")}
    state = {key: value for key, value in weights.items() if key in own}
    return {**kept, "elementrefs": kept["elementrefs"] or {}, "state_dict": state}


def _apart(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _APART}
