"""What a training looks at before its first step: samples, room for checkpoints, other ranks.

What is wrong here would end it hours later, or never show at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils

from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import architecture_of
from fairchem_kd.training.checks import check_labels
from fairchem_kd.training.first_samples import (
    Search,
    check_neighbours,
    check_samples,
    read_sample,
)
from fairchem_kd.training.ranks import check_same_on_ranks, seen_by_rank
from fairchem_kd.training.room import check_room, size_of_checkpoint

if TYPE_CHECKING:
    import torch

    from fairchem_kd.stock.trainer import StockTrainer

#: Under which models keep the lengths within which they look for neighbours.
_CUTOFFS = ("cutoff", "cutoff_aint")


def check_split(trainer: StockTrainer, split: str) -> None:
    """Refuse a split whose samples losses, metrics, predictions or the model cannot take.

    Raises:
        UserError: naming the split, the sample and the key.
    """
    loader = _loaders(trainer)[split]
    if loader is None or len(loader.dataset) == 0:
        return
    targets = [name for name, _ in trainer.loss_functions]
    labels = {"train": targets, "val": list(trainer.output_targets), "test": []}[split]
    where = f"dataset.{split}"
    if labels:
        check_labels(read_sample(loader.dataset, 0, where), targets, where)
    check_samples(
        loader.dataset,
        where,
        trainer.output_targets,
        labels,
        named=split == "test",
        search=_search(trainer, split),
        elements=_elements(trainer._unwrapped_model),
    )
    check_neighbours(loader.dataset, where, trainer._unwrapped_model, trainer.device)


def _elements(model: torch.nn.Module) -> int | None:
    """The last atomic number that a model has a row for, where that is known of its kind."""
    try:
        return architecture_of(model).num_elements
    except UserError:
        return None


def check_space(trainer: StockTrainer) -> None:
    """Make sure, on the first rank, that checkpoints can be written and that some have room.

    Raises:
        UserError: they cannot, or have not.
    """
    if distutils.is_master() and not trainer.is_debug:
        size = size_of_checkpoint(trainer.model, averaged=trainer.ema is not None)
        check_room(trainer.config["cmd"]["checkpoint_dir"], size)


def check_ranks(trainer: StockTrainer, more: Mapping[str, Any]) -> None:
    """Make sure that all ranks go on from the same step, with the same data and config.

    Args:
        more: what else has to be the same, by what a user calls it.

    Raises:
        UserError: on every rank, where one of them sees something else.
    """
    if distutils.get_world_size() == 1:
        return
    loaders = _loaders(trainer).items()
    datasets = {f"dataset.{name}": one.dataset for name, one in loaders if one is not None}
    seen = seen_by_rank(trainer.config, datasets)
    seen["the run's checkpoint"] = f"step {trainer.step}"
    check_same_on_ranks(seen | dict(more))


def _loaders(trainer: StockTrainer) -> dict[str, Any]:
    return {"train": trainer.train_loader, "val": trainer.val_loader, "test": trainer.test_loader}


def _search(trainer: StockTrainer, split: str) -> Search | None:
    """How the model looks for neighbours in batches of a split; None where it does not say."""
    model = getattr(trainer._unwrapped_model, "backbone", trainer._unwrapped_model)
    if not (getattr(model, "use_pbc", True) and getattr(model, "otf_graph", True)):
        return None
    cutoffs = [getattr(model, name, None) for name in _CUTOFFS]
    known = [float(one) for one in cutoffs if isinstance(one, int | float)]
    if not known:
        return None
    optim = trainer.config["optim"]
    size = optim["batch_size"]
    if split != "train":
        size = optim.get("eval_batch_size", size)
    return Search(max(known), int(size), trainer.device)
