"""The sums of `edge_to_node` on CPU: products with sparse matrices that never copy the features.

`torch.sparse.mm(matrix, dense, "sum")` runs PyTorch's own kernel: a loop over the entries of each
row, vectorised over the channels, one row per thread at a time, so the result does not depend on
the threads. (``matrix @ dense`` runs MKL's.) Sums of scalars that are over before an operator is
called are left to PyTorch's own. `docs/edge_to_node.md` compares the ways.
"""

from __future__ import annotations

import warnings
from functools import cache, partial

import torch
from torch import Tensor

from fairchem_kd.ops.order import EdgeOrder

with warnings.catch_warnings():  # torch says once per process that CSR support is in beta
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()

_arange = partial(torch.arange, device="cpu")  # the default device may be another

# Where rows lie apart, are long and many, MKL's product is about a quarter faster than PyTorch's.
MKL_FROM_CHANNELS = 512
MKL_FROM_NUMBERS = 2**24

# Below this many numbers for each thread, calling an operator costs more than it gains.
PLAIN_NUMBERS = 2**23


def takes_plain(features: Tensor, is_sorted: bool) -> bool:
    """Whether `plain_nodes` is the fastest way to sum these features."""
    threads = torch.get_num_threads()
    return features.numel() * threads < PLAIN_NUMBERS or (is_sorted and threads == 1)


def plain_nodes(
    features: Tensor, target: Tensor, num_nodes: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    """The sums of scalars ``(N, C)`` by PyTorch's own operators, which know their derivatives.

    Of an index that is the same for all channels, `scatter_add` on CPU adds whole rows, each
    atom's in the order of the edges, and its derivative gathers whole rows.
    """
    dense = features.to(_summed_as(features.dtype, dtype, mean))
    zeros = dense.new_zeros(num_nodes, dense.shape[1])
    total = zeros.scatter_add(0, target[:, None].expand_as(dense), dense)
    if mean:
        degree = target.bincount(minlength=num_nodes).clamp(min=1)
        total = total / degree.to(total.dtype)[:, None]
    return total.to(dtype)


def nodes(
    features: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One product, with K rows per atom that follow each other, so that they share the cache."""
    if vectors is None:
        accumulate = _summed_as(features.dtype, dtype, mean)
    else:  # the vectors take the type of what they multiply
        accumulate = accumulator(features.dtype, dtype)
    dense = features.to(accumulate).contiguous()
    num_edges, channels = dense.shape
    if vectors is None:
        columns = _arange(num_edges) if order.perm is None else order.perm
        matrix = _csr(order.offsets, columns, dense.new_ones(num_edges), num_edges)
        if (
            order.perm is not None
            and channels >= MKL_FROM_CHANNELS
            and dense.numel() >= MKL_FROM_NUMBERS
            and dense.dtype in (torch.float32, torch.float64)
            and torch.backends.mkl.is_available()
        ):
            with torch.autocast("cpu", enabled=False):
                total = matrix @ dense
        else:
            total = _product(matrix, dense)
        rows = 1
    else:
        rows = 3 + scalar
        starts, degree = order.offsets[:-1], order.offsets.diff()
        row_starts = starts[:, None] * rows + degree[:, None] * _arange(rows)
        row_starts = torch.cat([row_starts.view(-1), row_starts.new_tensor([num_edges * rows])])
        # from an entry of the matrix to its place in the order, and to its row's kind
        lengths = degree.repeat_interleave(rows)
        shift = starts.repeat_interleave(rows) - row_starts[:-1]
        places = _arange(num_edges * rows) + shift.repeat_interleave(lengths)
        columns = places if order.perm is None else order.perm.index_select(0, places)
        kind = _arange(rows).repeat(order.num_nodes).repeat_interleave(lengths)
        weights = dense.new_ones(num_edges, rows)
        weights[:, rows - 3 :] = vectors
        values = weights.view(-1).index_select(0, columns * rows + kind)
        total = _product(_csr(row_starts, columns, values, num_edges), dense)
    total = total.view(order.num_nodes, rows, channels)
    if mean:
        total /= _degree(order, accumulate)[:, None, None]
    return total.to(dtype)


def edges(
    nodes: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A gather, or one product with K entries per edge."""
    accumulate = accumulator(nodes.dtype, dtype)
    dense = nodes.to(accumulate)
    if mean:
        dense = dense / _degree(order, accumulate)[:, None, None]
    if vectors is None:
        dense = dense[:, 0].to(dtype)
        return dense.gather(0, order.target[:, None].expand(-1, dense.shape[1]))
    rows = dense.shape[1]
    dense = dense.reshape(-1, dense.shape[2])
    weights = dense.new_ones(order.num_edges, rows)
    weights[:, rows - 3 :] = vectors
    matrix = _csr(*_entries(order, rows), weights.view(-1), dense.shape[0])
    return _product(matrix, dense).to(dtype)


def dots(
    features: Tensor, nodes: Tensor, order: EdgeOrder, mean: bool, dtype: torch.dtype
) -> Tensor:
    """Only those entries of the product of all edges with all atoms that belong together."""
    accumulate = accumulator(features.dtype, nodes.dtype, dtype)
    dense = nodes.to(accumulate).reshape(-1, nodes.shape[2])
    zeros = dense.new_zeros(order.num_edges * 3)
    mask = _csr(*_entries(order, 3), zeros, dense.shape[0])
    with torch.autocast("cpu", enabled=False):
        product = torch.sparse.sampled_addmm(mask, features.to(accumulate), dense.t())
    result = product.values().view(order.num_edges, 3)
    if mean:
        result = result / _degree(order, accumulate)[order.target, None]
    return result.to(dtype)


def _summed_as(features: torch.dtype, result: torch.dtype, mean: bool) -> torch.dtype:
    """What the features are given to a sum of scalars as: a conversion costs more than the sum."""
    if features == result and not mean and keeps_sums_in_float32(features):
        return features
    return accumulator(features, result)


@cache
def keeps_sums_in_float32(dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds up rows of a half-precision type in float32 and then rounds.

    A running sum of ones would stop at 256 in bfloat16, and at 2048 in float16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    number = 4096
    ones = torch.ones(number, 3, dtype=dtype, device="cpu")
    index = ones.new_zeros(number, 1, dtype=torch.int64).expand_as(ones)
    matrix = _csr(_arange(2) * number, _arange(number), ones[:, 0], number)
    try:
        with torch.inference_mode():
            sums = (ones.new_zeros(1, 3).scatter_add(0, index, ones), _product(matrix, ones))
    except RuntimeError:  # PyTorch 2.4 has no product in float16
        return False
    return all(bool((total == number).all()) for total in sums)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The precision of the sums: double where any part of it is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _degree(order: EdgeOrder, dtype: torch.dtype) -> Tensor:
    return order.offsets.diff().clamp(min=1).to(dtype)


def _entries(order: EdgeOrder, rows: int) -> tuple[Tensor, Tensor]:
    """Row starts and columns of the matrix (E, N * rows) from atoms to edges."""
    columns = (order.target[:, None] * rows + _arange(rows)).view(-1)
    return _arange(order.num_edges + 1) * rows, columns


def _csr(row_starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    shape = (row_starts.numel() - 1, width)
    return torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)


def _product(matrix: Tensor, dense: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.sparse.mm(matrix, dense, "sum")
