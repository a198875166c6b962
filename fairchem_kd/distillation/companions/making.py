"""The companions of a training, out of its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fairchem_kd.distillation.companions.join import Companions
from fairchem_kd.distillation.companions.rattle import RattleOptions, Rattler
from fairchem_kd.distillation.companions.unlabelled import UnlabelledLoader, UnlabelledOptions
from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.training.ranks import rank, world_size

if TYPE_CHECKING:
    from torch.utils.data import Dataset


def make_companions(
    rattle: RattleOptions | None,
    unlabelled: UnlabelledOptions | None,
    student: nn.Module,
    *,
    labelled: int,
    batch_size: int,
    max_epochs: float,
    seed: int,
    make_loader: Callable[..., Any],
    keep: Callable[[Dataset], Dataset],
    check_elements: Callable[[torch.Tensor], None],
) -> Companions | None:
    """What goes with the labelled structures of a step; None where nothing does.

    Args:
        rattle: of the config.
        unlabelled: of the config.
        student: which has to make graphs itself.
        labelled: structures of the training set.
        batch_size: labelled structures of a step, on a rank.
        max_epochs: how often the training goes through the training set.
        seed: of what is drawn.
        make_loader: the trainer's ``get_dataloader``.
        keep: makes samples that are read once of a data set.
        check_elements: refuses atoms that the teacher knows nothing about.

    Raises:
        UserError: options that do not go with each other, the student or the structures.
    """
    if rattle is None and unlabelled is None:
        return None
    if not getattr(backbone_of(student), "otf_graph", False):
        raise UserError(
            "task.distillation.rattle and unlabelled need model.otf_graph: true (of a hydra, "
            "model.backbone.otf_graph), since a graph read from the data set does not know "
            "the structures that they add."
        )
    loader = None
    if unlabelled is not None:
        loader = UnlabelledLoader(
            unlabelled,
            labelled=batch_size,
            seed=seed,
            rank=rank(),
            ranks=world_size(),
            make_loader=make_loader,
            keep=keep,
        )
        loader.check(check_elements)
    rattler = None
    if rattle is not None and rattle.copies > 0:
        more = 0 if loader is None else loader.options.per_step(batch_size)
        rattle.check_pairs(batch_size + more)
        rattler = Rattler(rattle, seed, _copies_of_each(rattle, loader, labelled, max_epochs))
    return Companions(rattler, loader)


def _copies_of_each(
    rattle: RattleOptions, unlabelled: UnlabelledLoader | None, labelled: int, epochs: float
) -> float:
    """Rattled copies of each structure that the training takes, whatever its ranks."""
    taken, structures = float(labelled), labelled
    if unlabelled is not None:
        share = unlabelled.options.share
        taken += labelled * share / (1 - share)
        structures += len(unlabelled.dataset)
    return epochs * rattle.copies * taken / max(structures, 1)
