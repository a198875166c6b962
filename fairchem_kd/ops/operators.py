"""The three sums behind `edge_to_node`, as torch operators.

With ``t(e)`` the target atom of edge ``e``, u the edges' vectors, and K rows per atom: one for the
scalars if ``scalar``, and three for x, y, z if there are vectors,

    nodes(f, u)[i, :, c] = sum over e -> i of (1, u[e]) f[e, c]      (N, K, C)
    edges(g, u)[e, c]    = (1, u[e]) . g[t(e), :, c]                  (E, C)
    dots(f, g)[e, k]     = sum over c of f[e, c] g[t(e), k, c]        (E, 3)

and, with ``mean``, each is divided by the degree of its atom. The derivatives of each are the other
two, so that autograd works to any order. Custom operators are opaque to ``torch.compile`` and are
never cast by autocast.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fairchem_kd.ops import cpu, segments
from fairchem_kd.ops.backend import Backend
from fairchem_kd.ops.order import EdgeOrder
from fairchem_kd.ops.selfcheck import agrees


@cache
def backend_for(device_type: str) -> Backend:
    """The fastest way that is there for this type of device."""
    if device_type == "cpu":
        return cpu
    if device_type == "cuda":
        try:
            from fairchem_kd.ops import triton_kernels
        except ImportError:  # Triton comes with PyTorch for CUDA on Linux, not everywhere
            return segments
        if agrees(triton_kernels, segments, device_type):
            return triton_kernels
        logging.warning(
            "The Triton kernels of edge_to_node fail a self-check on this GPU: sums of edges take "
            "the plain PyTorch way, which is slower. Please report this with `fairchem-kd doctor`."
        )
    return segments


_ORDER = "Tensor target, Tensor? perm, Tensor offsets"


@torch.library.custom_op(
    "fairchem_kd::edge_sum_nodes",
    mutates_args=(),
    schema=f"(Tensor features, Tensor? vectors, {_ORDER}, bool scalar, bool mean, "
    "ScalarType dtype) -> Tensor",
)
def nodes_op(
    features: Tensor, vectors: Tensor | None, target: Tensor, perm: Tensor | None, offsets: Tensor,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    order = EdgeOrder(target, perm, offsets)
    if features.numel() == 0 or order.num_nodes == 0:
        rows = scalar + 3 * (vectors is not None)
        return features.new_zeros(order.num_nodes, rows, features.shape[1], dtype=dtype)
    run = backend_for(features.device.type).nodes
    return run(features, vectors, order, scalar, mean, dtype)


@torch.library.custom_op(
    "fairchem_kd::edge_sum_edges",
    mutates_args=(),
    schema=f"(Tensor nodes, Tensor? vectors, {_ORDER}, bool scalar, bool mean, "
    "ScalarType dtype) -> Tensor",
)
def edges_op(
    nodes: Tensor, vectors: Tensor | None, target: Tensor, perm: Tensor | None, offsets: Tensor,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    order = EdgeOrder(target, perm, offsets)
    if nodes.numel() == 0 or order.num_edges == 0:
        return nodes.new_zeros(order.num_edges, nodes.shape[2], dtype=dtype)
    return backend_for(nodes.device.type).edges(nodes, vectors, order, scalar, mean, dtype)


@torch.library.custom_op(
    "fairchem_kd::edge_sum_dots",
    mutates_args=(),
    schema=f"(Tensor features, Tensor nodes, {_ORDER}, bool mean, ScalarType dtype) -> Tensor",
)
def dots_op(
    features: Tensor, nodes: Tensor, target: Tensor, perm: Tensor | None, offsets: Tensor,
    mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    order = EdgeOrder(target, perm, offsets)
    if features.numel() == 0 or order.num_nodes == 0:
        return features.new_zeros(order.num_edges, 3, dtype=dtype)
    return backend_for(features.device.type).dots(features, nodes, order, mean, dtype)


@nodes_op.register_fake
def _(features, vectors, target, perm, offsets, scalar, mean, dtype):
    rows = int(scalar) + (0 if vectors is None else 3)
    return features.new_empty(offsets.shape[0] - 1, rows, features.shape[1], dtype=dtype)


@edges_op.register_fake
def _(nodes, vectors, target, perm, offsets, scalar, mean, dtype):
    return nodes.new_empty(target.shape[0], nodes.shape[2], dtype=dtype)


@dots_op.register_fake
def _(features, nodes, target, perm, offsets, mean, dtype):
    return features.new_empty(target.shape[0], 3, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For nodes and edges: the dense input, the vectors and the order; the rest are numbers."""
    dense, vectors, target, perm, offsets, ctx.scalar, ctx.mean, _ = inputs
    ctx.save_for_backward(dense, vectors, target, perm, offsets)


def _nodes_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, vectors, *order = ctx.saved_tensors
    for_features = for_vectors = None
    if ctx.needs_input_grad[0]:
        for_features = edges_op(grad, vectors, *order, ctx.scalar, ctx.mean, features.dtype)
    if ctx.needs_input_grad[1]:
        for_vectors = dots_op(features, grad[:, ctx.scalar :], *order, ctx.mean, vectors.dtype)
    return for_features, for_vectors, None, None, None, None, None, None


def _edges_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    nodes, vectors, *order = ctx.saved_tensors
    for_nodes = for_vectors = None
    if ctx.needs_input_grad[0]:
        for_nodes = nodes_op(grad, vectors, *order, ctx.scalar, ctx.mean, nodes.dtype)
    if ctx.needs_input_grad[1]:
        for_vectors = dots_op(grad, nodes[:, ctx.scalar :], *order, ctx.mean, vectors.dtype)
    return for_nodes, for_vectors, None, None, None, None, None, None


def _remember_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, nodes, target, perm, offsets, ctx.mean, _ = inputs
    ctx.save_for_backward(features, nodes, target, perm, offsets)


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, nodes, *order = ctx.saved_tensors
    for_features = for_nodes = None
    if ctx.needs_input_grad[0]:
        for_features = edges_op(nodes, grad, *order, False, ctx.mean, features.dtype)
    if ctx.needs_input_grad[1]:
        for_nodes = nodes_op(features, grad, *order, False, ctx.mean, nodes.dtype)
    return for_features, for_nodes, None, None, None, None, None


nodes_op.register_autograd(_nodes_backward, setup_context=_remember)
edges_op.register_autograd(_edges_backward, setup_context=_remember)
dots_op.register_autograd(_dots_backward, setup_context=_remember_dots)
