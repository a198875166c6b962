"""Stock's models as functions of positions that autograd can follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def followed(backbone: nn.Module) -> Iterator[None]:
    """Within the block, outputs of a model can be differentiated with respect to ``batch.pos``.

    Stock's PaiNN writes into the distances of its graph, which autograd needs as they were where
    they are no copy (without periodicity), so it gets a copy. That a model detaches parts of its
    graph (EquiformerV2, eSCN: the rotations of edges) cannot be mended here.

    Args:
        backbone: the stock model, or the backbone of a hydra.
    """
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
