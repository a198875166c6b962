"""Sum edge features onto their target atoms, alone and with the edges' unit vectors.

Both sums are one weighted segment sum with K weights per edge: 1 for the scalars and x, y, z for
the vectors. It is linear in the weights ``w`` and in the features ``f``; its derivatives are linear
in a node tensor ``g`` too. With ``t(e)`` the target atom of edge ``e`` there are three operations,

    nodes(w, f)[i, k, c] = sum over e -> i of w[e, k] f[e, c]        (N, K, C)
    edges(w, g)[e, c]    = sum over k of w[e, k] g[t(e), k, c]       (E, C)
    weights(f, g)[e, k]  = sum over c of f[e, c] g[t(e), k, c]       (E, K)

and the derivatives of each are the other two, so autograd works to any order (in the code,
``weights`` None means K = 1 and all ones, which are never differentiated). There are no float
atomics (whose result varies from run to run on a GPU) and there is no (E, 3, C) tensor, forward or
backward.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

with warnings.catch_warnings():  # torch says once per process that CSR support is in beta
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


class _Order(NamedTuple):
    """The edges of one call, and their order by target atom (the CSR order)."""

    target: Tensor  # (E,) target atom of each edge, as given
    perm: Tensor  # (E,) edges, stably sorted by target atom
    offsets: Tensor  # (N + 1,) where the edges of each atom begin in perm

    @property
    def degree(self) -> Tensor:
        """Edges into each atom, (N,)."""
        return self.offsets.diff()


def _sort_by_target(target: Tensor, num_nodes: int) -> _Order:
    ordered, perm = torch.sort(target, stable=True)
    atoms = torch.arange(num_nodes + 1, device=target.device)
    return _Order(target, perm, torch.searchsorted(ordered, atoms))


def _sparse_product(
    row_starts: Tensor, columns: Tensor, values: Tensor, width: int, dense: Tensor
) -> Tensor:
    """(R, C) product of a CSR matrix (R, width) with ``dense`` (width, C), in its precision."""
    shape = (row_starts.numel() - 1, width)
    matrix = torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)
    with torch.autocast(dense.device.type, enabled=False):
        return matrix @ dense


def _nodes_cpu(weights: Tensor | None, features: Tensor, order: _Order) -> Tensor:
    """One CSR product with K rows per atom: reads each edge's features from memory once."""
    num_edges, starts, degree = features.shape[0], order.offsets[:-1], order.degree
    if weights is None:
        ones = features.new_ones(num_edges)
        return _sparse_product(order.offsets, order.perm, ones, num_edges, features)[:, None]
    k = weights.shape[1]
    first, step = (x.repeat_interleave(degree) for x in (starts, degree))
    rank = torch.arange(num_edges) - first  # of each edge within its atom
    entry = (rank + k * first)[:, None] + step[:, None] * torch.arange(k)
    entry = entry.view(-1)
    columns = torch.empty_like(entry)
    columns[entry] = order.perm.repeat_interleave(k)
    values = weights.new_empty(num_edges * k)
    values[entry] = weights.index_select(0, order.perm).view(-1)
    row_starts = (starts[:, None] * k + degree[:, None] * torch.arange(k)).view(-1)
    row_starts = torch.cat([row_starts, row_starts.new_tensor([num_edges * k])])
    product = _sparse_product(row_starts, columns, values, num_edges, features)
    return product.view(len(degree), k, -1)


def _nodes_segments(weights: Tensor | None, features: Tensor, order: _Order) -> Tensor:
    """One segmented reduction per component, in CSR order: deterministic on every device."""
    ordered = features.index_select(0, order.perm)
    if weights is None:
        return _segment_sum(ordered, order)[:, None]
    factors = weights.index_select(0, order.perm)
    parts = [_segment_sum(ordered * factor[:, None], order) for factor in factors.unbind(1)]
    return torch.stack(parts, dim=1)


def _segment_sum(ordered: Tensor, order: _Order) -> Tensor:
    # unsafe: the lengths are right by construction, and checking them would wait for the device
    return torch.segment_reduce(ordered, "sum", lengths=order.degree, unsafe=True, initial=0)


def _edges_cpu(weights: Tensor | None, nodes: Tensor, order: _Order) -> Tensor:
    """One CSR product with K entries per edge."""
    if weights is None:
        return nodes[:, 0].index_select(0, order.target)
    num_edges, k = weights.shape
    columns = (order.target[:, None] * k + torch.arange(k)).view(-1)
    row_starts = torch.arange(num_edges + 1) * k
    dense = nodes.reshape(-1, nodes.shape[-1])
    return _sparse_product(row_starts, columns, weights.reshape(-1), dense.shape[0], dense)


def _edges_gather(weights: Tensor | None, nodes: Tensor, order: _Order) -> Tensor:
    """One gather per component."""
    if weights is None:
        return nodes[:, 0].index_select(0, order.target)
    total = weights[:, :1] * nodes[:, 0].index_select(0, order.target)
    for k in range(1, weights.shape[1]):
        gathered = nodes[:, k].index_select(0, order.target)
        total = torch.addcmul(total, weights[:, k, None], gathered)
    return total


class _Nodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, features: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(weights, features)
        ctx.order = order
        run = _nodes_cpu if features.device.type == "cpu" else _nodes_segments
        return run(weights, features, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, features = ctx.saved_tensors
        return (
            _Weights.apply(features, grad, ctx.order) if ctx.needs_input_grad[0] else None,
            _Edges.apply(weights, grad, ctx.order) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Edges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, nodes: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(weights, nodes)
        ctx.order = order
        run = _edges_cpu if nodes.device.type == "cpu" else _edges_gather
        return run(weights, nodes, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, nodes = ctx.saved_tensors
        return (
            _Weights.apply(grad, nodes, ctx.order) if ctx.needs_input_grad[0] else None,
            _Nodes.apply(weights, grad, ctx.order) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, nodes: Tensor, order: _Order) -> Tensor:
        ctx.save_for_backward(features, nodes)
        ctx.order = order
        columns = [
            (features * nodes[:, k].index_select(0, order.target)).sum(-1)
            for k in range(nodes.shape[1])
        ]
        return torch.stack(columns, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, nodes = ctx.saved_tensors
        return (
            _Edges.apply(grad, nodes, ctx.order) if ctx.needs_input_grad[0] else None,
            _Nodes.apply(grad, features, ctx.order) if ctx.needs_input_grad[1] else None,
            None,
        )


@overload
def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: None = None,
    reduce: Literal["sum", "mean"] = "sum",
) -> Tensor: ...


@overload
def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: Tensor,
    reduce: Literal["sum", "mean"] = "sum",
) -> tuple[Tensor, Tensor]: ...


def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: Tensor | None = None,
    reduce: Literal["sum", "mean"] = "sum",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum edge features ``(E, C)`` onto the edges' target atoms, ``(N, C)``.

    With ``edge_vectors`` ``(E, 3)`` the same pass also returns ``(N, 3, C)``, where
    ``vector[i, k, c]`` is the sum over the edges e into atom i of
    ``edge_vectors[e, k] * edge_features[e, c]`` (the e2n and v2v targets of arXiv 2306.14818,
    section 3).

    ``target_index`` ``(E,)`` may be in any order; atoms without edges get zeros. Half types are
    accumulated in fp32; the result has the features' type. The result is bit for bit
    reproducible, and differentiable to any order in the features and in the vectors.

    Args:
        edge_features: ``(E, C)``, floating point.
        target_index: ``(E,)``, int64, row 1 of ``edge_index``, each in ``[0, num_nodes)``. The
            range is checked on CPU only: elsewhere the check would wait for the device.
        num_nodes: N.
        edge_vectors: ``(E, 3)`` or None.
        reduce: ``sum`` or ``mean`` over the edges into each atom.

    Raises:
        ValueError: for a wrong shape, device, index range or ``reduce``.
        TypeError: for a wrong type of number.
    """
    _check(edge_features, target_index, num_nodes, edge_vectors, reduce)
    dtype = torch.float64 if edge_features.dtype == torch.float64 else torch.float32
    features = edge_features.to(dtype).contiguous()
    weights = None
    if edge_vectors is not None:
        weights = torch.cat([features.new_ones(len(features), 1), edge_vectors.to(dtype)], dim=1)
    if features.numel() == 0:
        # empty sums, still connected to their inputs
        nodes = features.new_zeros(num_nodes, 1 if weights is None else 4, features.shape[1])
        nodes = nodes + features.sum() + (0 if edge_vectors is None else 0 * edge_vectors.sum())
    else:
        order = _sort_by_target(target_index, num_nodes)
        nodes = _Nodes.apply(weights, features, order)
        if reduce == "mean":
            nodes = nodes / order.degree.clamp(min=1).to(dtype)[:, None, None]
    nodes = nodes.to(edge_features.dtype)
    return nodes[:, 0] if edge_vectors is None else (nodes[:, 0], nodes[:, 1:])


def _check(
    features: Tensor, target: Tensor, num_nodes: int, vectors: Tensor | None, reduce: str
) -> None:
    if reduce not in ("sum", "mean"):
        raise ValueError(f"edge_to_node: reduce must be 'sum' or 'mean', not {reduce!r}")
    if features.dim() != 2:
        raise ValueError(f"edge_to_node: edge_features must be (E, C), not {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"edge_to_node: edge_features must be floating point, not {features.dtype}")
    num_edges = features.shape[0]
    if target.shape != (num_edges,):
        raise ValueError(
            f"edge_to_node: target_index must be ({num_edges},) like the {num_edges} edge features,"
            f" not {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"edge_to_node: target_index must be int64, not {target.dtype}")
    if vectors is not None and vectors.shape != (num_edges, 3):
        raise ValueError(
            f"edge_to_node: edge_vectors must be ({num_edges}, 3), not {tuple(vectors.shape)}"
        )
    if vectors is not None and not vectors.is_floating_point():
        raise TypeError(f"edge_to_node: edge_vectors must be floating point, not {vectors.dtype}")
    devices = {features.device, target.device} | (set() if vectors is None else {vectors.device})
    if len(devices) > 1:
        raise ValueError(f"edge_to_node: inputs on several devices: {sorted(map(str, devices))}")
    if num_nodes < 0 or (num_nodes == 0 and num_edges > 0):
        raise ValueError(f"edge_to_node: {num_edges} edges cannot end on num_nodes={num_nodes}")
    if target.device.type == "cpu" and num_edges > 0:
        low, high = (int(bound) for bound in torch.aminmax(target))
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"edge_to_node: target_index has {low if low < 0 else high},"
                f" outside [0, {num_nodes})"
            )
