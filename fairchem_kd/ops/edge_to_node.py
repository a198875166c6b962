"""Sum edge features onto their target atoms, alone and with the edges' unit vectors.

There are no float atomics (whose result varies from run to run on a GPU), and there is no (E, 3, C)
tensor, forward or backward. The sums themselves: `fairchem_kd.ops.operators`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fairchem_kd.ops import cpu, operators
from fairchem_kd.ops.operators import nodes_op
from fairchem_kd.ops.order import EdgeOrder, check_range, edge_order, looks_at_values


@overload
def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: None = None,
    reduce: Literal["sum", "mean"] = "sum",
    order: EdgeOrder | None = None,
    out_dtype: torch.dtype | None = None,
    check: bool | None = None,
) -> Tensor: ...


@overload
def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: Tensor,
    reduce: Literal["sum", "mean"] = "sum",
    order: EdgeOrder | None = None,
    out_dtype: torch.dtype | None = None,
    check: bool | None = None,
) -> tuple[Tensor, Tensor]: ...


def edge_to_node(
    edge_features: Tensor,
    target_index: Tensor,
    num_nodes: int,
    *,
    edge_vectors: Tensor | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    order: EdgeOrder | None = None,
    out_dtype: torch.dtype | None = None,
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum edge features ``(E, C)`` onto the edges' target atoms, ``(N, C)``.

    With ``edge_vectors`` ``(E, 3)`` the same pass also returns ``(N, 3, C)``, where
    ``vector[i, k, c]`` is the sum over the edges e into atom i of
    ``edge_vectors[e, k] * edge_features[e, c]`` (the e2n and v2v targets of arXiv 2306.14818,
    section 3).

    ``target_index`` ``(E,)`` may be in any order; atoms without edges get zeros. Accumulates in
    fp32, or in fp64 where the features or the result are fp64. The result is bit for bit
    reproducible, and differentiable to any order in the features and in the vectors.

    Args:
        edge_features: ``(E, C)``, floating point.
        target_index: ``(E,)``, int64, row 1 of ``edge_index``, each in ``[0, num_nodes)``.
        num_nodes: N.
        edge_vectors: ``(E, 3)`` or None.
        reduce: ``sum`` or ``mean`` over the edges into each atom.
        order: `edge_order` of these ``target_index`` and ``num_nodes``, where several sums share
            it; without one, every call sorts.
        out_dtype: type of the result; None: that of the features.
        check: whether to look at the values of ``target_index``. None: on CPU, and under
            ``torch.autograd.detect_anomaly``; elsewhere looking would wait for the device. The sums
            of an index out of range that nobody looks for are undefined, but touch no other memory.
            With an ``order``, whose making was the time to look, only True looks again.

    Raises:
        ValueError: for a wrong shape, device, index range, order or ``reduce``.
        TypeError: for a wrong type of number.
    """
    if out_dtype is None:
        out_dtype = edge_features.dtype
    _check(edge_features, target_index, num_nodes, edge_vectors, reduce, out_dtype)
    # an index that nobody looked at is safe in the operator alone
    plainly = edge_vectors is None and check is not False and _runs_on_cpu(edge_features)
    try:
        if order is not None:
            _check_order(order, target_index, num_nodes, check)
        elif plainly and cpu.takes_plain(edge_features, is_sorted=False):
            check_range(target_index, num_nodes)
        else:
            order = edge_order(target_index, num_nodes, check=check)
    except ValueError as error:
        raise ValueError(f"edge_to_node: {error}") from None
    mean = reduce == "mean"
    if order is None or (plainly and cpu.takes_plain(edge_features, order.perm is None)):
        target = target_index if order is None else order.target
        return cpu.plain_nodes(edge_features, target, num_nodes, mean, out_dtype)
    nodes = nodes_op(edge_features, edge_vectors, *order, True, mean, out_dtype)
    return nodes[:, 0] if edge_vectors is None else (nodes[:, 0], nodes[:, 1:])


def _runs_on_cpu(features: Tensor) -> bool:
    """Whether the CPU's own way is taken, here and now: a compiler is given the operator."""
    is_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_cpu and operators.backend_for("cpu") is cpu


def _check(
    features: Tensor,
    target: Tensor,
    num_nodes: int,
    vectors: Tensor | None,
    reduce: str,
    out_dtype: torch.dtype,
) -> None:
    if reduce not in ("sum", "mean"):
        raise ValueError(f"edge_to_node: reduce must be 'sum' or 'mean', not {reduce!r}")
    if features.dim() != 2:
        raise ValueError(f"edge_to_node: edge_features must be (E, C), not {tuple(features.shape)}")
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
    for name, tensor in (("edge_features", features), ("edge_vectors", vectors)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"edge_to_node: {name} must be floating point, not {tensor.dtype}")
    if not out_dtype.is_floating_point:
        raise TypeError(f"edge_to_node: out_dtype must be floating point, not {out_dtype}")
    device = features.device
    if target.device != device or (vectors is not None and vectors.device != device):
        devices = {tensor.device for tensor in (features, target, vectors) if tensor is not None}
        raise ValueError(f"edge_to_node: inputs on several devices: {sorted(map(str, devices))}")


def _check_order(order: EdgeOrder, target: Tensor, num_nodes: int, check: bool | None) -> None:
    if (order.num_edges, order.num_nodes) != (target.shape[0], num_nodes):
        raise ValueError(
            f"the order is of {order.num_edges} edges onto {order.num_nodes} atoms, and not of "
            f"{target.shape[0]} onto {num_nodes}"
        )
    if order.target.device != target.device:
        raise ValueError(f"the order is on {order.target.device}, the edges are on {target.device}")
    if check and looks_at_values(target, check) and not torch.equal(order.target, target):
        raise ValueError("the order is that of another target_index")
