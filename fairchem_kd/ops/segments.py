"""The sums of `edge_to_node` in plain PyTorch, for devices without a kernel of their own.

Segmented reductions in the CSR order and gathers: no atomics, so the same bits on every run. They
pass over the edges once per component.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairchem_kd.ops.cpu import accumulator
from fairchem_kd.ops.order import EdgeOrder


def nodes(
    features: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One segmented reduction per component."""
    accumulate = accumulator(features.dtype, dtype)
    ordered = _in_order(features, order).to(accumulate)
    parts = [_segment_sum(ordered, order)] if scalar else []
    if vectors is not None:
        factors = _in_order(vectors, order).to(accumulate)
        parts += [_segment_sum(ordered * factor[:, None], order) for factor in factors.unbind(1)]
    total = torch.stack(parts, dim=1)
    if mean:
        total = total / order.offsets.diff().clamp(min=1).to(accumulate)[:, None, None]
    return total.to(dtype)


def edges(
    nodes: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One gather per component."""
    accumulate = accumulator(nodes.dtype, dtype)
    dense = _divided(nodes.to(accumulate), order, mean)
    total = dense[:, 0].index_select(0, order.target) if scalar else None
    if vectors is not None:
        factors = vectors.to(accumulate)
        for k in range(3):
            part = factors[:, k, None] * dense[:, scalar + k].index_select(0, order.target)
            total = part if total is None else total.add_(part)
    assert total is not None  # there are scalars or vectors
    return total.to(dtype)


def dots(
    features: Tensor, nodes: Tensor, order: EdgeOrder, mean: bool, dtype: torch.dtype
) -> Tensor:
    """One gather and one row sum per component."""
    accumulate = accumulator(features.dtype, nodes.dtype, dtype)
    left, dense = features.to(accumulate), _divided(nodes.to(accumulate), order, mean)
    parts = [(left * dense[:, k].index_select(0, order.target)).sum(1) for k in range(3)]
    return torch.stack(parts, dim=1).to(dtype)


def _divided(nodes: Tensor, order: EdgeOrder, mean: bool) -> Tensor:
    if not mean:
        return nodes
    return nodes / order.offsets.diff().clamp(min=1).to(nodes.dtype)[:, None, None]


def _in_order(values: Tensor, order: EdgeOrder) -> Tensor:
    return values if order.perm is None else values.index_select(0, order.perm)


def _segment_sum(ordered: Tensor, order: EdgeOrder) -> Tensor:
    # unsafe: the offsets are right by construction, and checking them would wait for the device
    return torch.segment_reduce(
        ordered.contiguous(), "sum", offsets=order.offsets, unsafe=True, initial=0
    )
