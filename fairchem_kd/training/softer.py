"""``task.soft_lengths`` over a training's life: what it begins from, goes on from, and saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.stock.soft_lengths import (
    averages_from_stock,
    averages_to_stock,
    soften_weights,
)
from fairchem_kd.stock.softness import WHERE, halvings, softness

if TYPE_CHECKING:
    from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage


def begin_soft(
    model: nn.Module,
    ema: ExponentialMovingAverage | None,
    before: float | None,
    config: Mapping[str, Any],
    path: str,
) -> None:
    """Soften what a training begins from as its config asks for, where that was not so before.

    At its start and not where weights are loaded: these are evaluated as they are.

    Args:
        model: bare.
        ema: the averages of its weights, where there are any.
        before: the softness with which the weights were trained.
        config: of the training.
        path: where they came from.

    Raises:
        UserError: they were trained with soft lengths, and the config has none.
    """
    after = softness(config)
    if after is None:
        if before is not None:
            raise UserError(
                f"The weights in {path} were trained with {WHERE}: {before:g}, and are of sizes "
                f"that train only with it: set {WHERE}: {before:g}."
            )
        return
    if halvings(before) == halvings(after):
        return
    had = "no softness" if before is None else f"the softness {before:g}"
    logging.info(
        f"The weights in {path} are of a PaiNN whose lengths of vectors had {had}, and get "
        f"{after:g} ({WHERE}): the training makes up for what that changes."
    )
    soften_weights(model, before, after, ema.shadow_params if ema else ())


def averages_for_training(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint whose averages, of stock's weights, are those of what ``model`` trains."""
    if not checkpoint.get("ema"):
        return checkpoint
    averages = averages_from_stock(model, checkpoint["ema"]["shadow_params"])
    return {**checkpoint, "ema": {**checkpoint["ema"], "shadow_params": averages}}


def averages_for_stock(ema: ExponentialMovingAverage, model: nn.Module) -> dict[str, Any]:
    """The state of averages of the parameters that ``model`` trains, as of stock's weights."""
    state = ema.state_dict()
    return {**state, "shadow_params": averages_to_stock(model, state["shadow_params"])}
