"""Stock's models as functions of positions that autograd can follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fairchem.core.models.esen.esen import MLP_EFS_Head
from fairchem.core.models.painn.painn import GatedEquivariantBlock
from torch import Tensor, nn

_TINY = 1e-15  # its square is a normal number, and what it adds to a sum is less than rounding


@contextmanager
def followed(model: nn.Module) -> Iterator[None]:
    """Within the block, outputs of a model can be differentiated with respect to ``batch.pos``.

    And once more, by its parameters. Stock's PaiNN writes into the distances of its graph, which
    autograd needs as they were where they are no copy (without periodicity), so it gets a copy; and
    its head for forces takes norms of vectors that are 0 for an atom without neighbours, of which
    the second derivative would be NaN, so there they are tiny and constant. Stock's eSEN leaves the
    graph of forces that are a gradient out of an evaluation, so its head takes this for a training,
    which is all that it goes by. That a model detaches parts of its graph (EquiformerV2, eSCN: the
    rotations of edges) cannot be mended here.

    Args:
        model: the stock model, a hydra too, not in DistributedDataParallel.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GatedEquivariantBlock):
                stack.callback(module.vec1_proj.register_forward_hook(_without_zeros).remove)
            if isinstance(module, MLP_EFS_Head):
                stack.callback(setattr, module, "training", module.training)
                module.training = True
        stack.enter_context(_distances_copied(getattr(model, "backbone", model)))
        yield


def _without_zeros(_module: nn.Module, _args: Any, vectors: Tensor) -> Tensor:
    """``(N, 3, C)``, with constants in place of those that are 0."""
    nothing = (vectors == 0).all(dim=-2, keepdim=True)
    return torch.where(nothing, _TINY, vectors)


@contextmanager
def _distances_copied(backbone: Any) -> Iterator[None]:
    generate: Any = getattr(backbone, "generate_graph", None)
    if generate is None:
        yield
        return

    def generate_graph(*args: Any, **options: Any) -> Any:
        graph = generate(*args, **options)
        if hasattr(graph, "edge_distance"):
            graph.edge_distance = graph.edge_distance.clone()
        return graph

    object.__setattr__(backbone, "generate_graph", generate_graph)
    try:
        yield
    finally:
        object.__delattr__(backbone, "generate_graph")
