"""The scale factors that GemNet-OC and PaiNN need before training, fitted.

Each factor brings the variance of one activation back to that of its input, measured on a few
batches of the training set with the freshly initialised model, in the order in which the factors
act. fairchem's :class:`ScaleFactor` does the measuring; its own command (``modules.scaling.fit``)
fails to start in fairchem-core 1.10, asks questions on a terminal and writes in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.utils import setup_logging
from fairchem.core.modules.scaling import ScaleFactor
from torch import nn
from tqdm import tqdm

from fairchem_kd.errors import UserError
from fairchem_kd.stock.trainer import StockTrainer, in_one_process

if TYPE_CHECKING:
    from collections.abc import Iterator


def scale_factors(model: nn.Module) -> dict[str, ScaleFactor]:
    """Every scale factor of a model, by its name there."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ScaleFactor)}


def scale_file_key(model: Mapping[str, Any]) -> str:
    """The key that a config's ``model`` block has its scale factors read from."""
    return "model.backbone.scale_file" if model.get("backbone") else "model.scale_file"


def scale_file_of(model: Mapping[str, Any]) -> Any:
    """What a config's ``model`` block has under that key; None where it names no file."""
    return (model.get("backbone") or model).get("scale_file")


def set_scale_file(model: dict[str, Any], path: str) -> None:
    """Have a config's ``model`` block read its scale factors from ``path``."""
    (model.get("backbone") or model)["scale_file"] = path


def are_fitted(model: nn.Module) -> bool:
    """Whether every scale factor of a model has a value; true of a model without any."""
    return all(factor.fitted for factor in scale_factors(model).values())


class _Reached(Exception):
    """The factor being fitted has seen the batch: the rest of the forward is not needed."""


@torch.no_grad()
def fit_scale_factors(
    model: nn.Module, batches: Iterable[Any], num_batches: int = 8
) -> dict[str, float]:
    """Fit every scale factor of ``model`` in place, each on the same ``num_batches`` batches.

    Returns:
        Factor by name, as ``model.scale_file`` wants it, in the order of evaluation.

    Raises:
        UserError: a model without scale factors, no batches, or a factor that cannot be fitted.
    """
    factors = scale_factors(model)
    if not factors:
        raise UserError(
            f"{type(model).__name__} has no scale factors to fit (GemNet-OC and PaiNN have)."
        )
    samples = list(islice(batches, num_batches))
    if not samples:
        raise UserError("The training set gave no batch: it is empty or smaller than one batch.")
    was_training = model.training
    model.eval()
    for factor in factors.values():
        factor.reset_()
    calls = _calls_in_order(model, factors, samples[0])
    silent = [name for name in factors if name not in calls]
    if silent:
        raise UserError(
            f"The scale factors {', '.join(silent)} take no part in the model's forward on this "
            "data; check that its interactions and cutoffs fit the structures."
        )
    for name in tqdm(calls, desc="Fitting scale factors", disable=None):
        factor = factors[name]
        with factor.fit_context_(), _stop_after(factor, calls[name]) as count:
            for batch in samples:
                count.clear()
                with suppress(_Reached):
                    model(batch)
            stats = dict(factor.stats or {})
            if not all(value > 0 for value in stats.values()):
                raise UserError(
                    f"The scale factor {name} cannot be fitted, for its input or output does not "
                    f"vary over the batches ({stats}); use more batches (--num-batches)."
                )
            factor.fit_()
    model.train(was_training)
    return {
        factors[name].name or name.removeprefix("backbone."): float(factors[name].scale_factor)
        for name in calls
    }


def _calls_in_order(model: nn.Module, factors: dict[str, ScaleFactor], batch: Any) -> dict:
    """How often one forward calls each factor; the keys in the order of the first calls."""
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, factor in factors.items():
        factor.initialize_(index_fn=lambda name=name: count(name))
    try:
        model(batch)
    finally:
        for factor in factors.values():
            factor.initialize_(index_fn=None)
    return calls


@contextmanager
def _stop_after(factor: nn.Module, calls: int) -> Iterator[list[None]]:
    """End the model's forward once ``factor`` was called ``calls`` times; yields its counter."""
    count: list[None] = []

    def hook(*_: Any) -> None:
        count.append(None)
        if len(count) == calls:
            raise _Reached

    handle = factor.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def trainer_for_scales(config: dict[str, Any], path: Path, *, seed: int, cpu: bool) -> StockTrainer:
    """A stock trainer in this process, for its model and its training batches.

    The config's own trainer is not asked, for a distillation would load a teacher first.

    Raises:
        UserError: the config, found at ``path``, has no training set.
    """
    setup_logging()
    dataset = config.get("dataset")
    train = dataset.get("train") if isinstance(dataset, dict) else None
    if not train or "src" not in train:
        raise UserError(f"{path} has no dataset.train.src, and scale factors are fitted on it.")
    model = {k: v for k, v in config["model"].items() if k != "scale_file"}
    if isinstance(model.get("backbone"), dict):
        model["backbone"] = {k: v for k, v in model["backbone"].items() if k != "scale_file"}
    return in_one_process(
        StockTrainer,
        config,
        {"train": train},
        identifier="fit-scales",
        cpu=cpu,
        model=model,
        seed=seed,
    )
