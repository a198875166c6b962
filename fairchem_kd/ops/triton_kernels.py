"""The sums of `edge_to_node` as Triton kernels, for CUDA devices.

Each program owns one atom and a block of channels, and walks over the edges into that atom in the
CSR order. So each edge's features are read once (for the scalars and all three components) or
written once, in rows that are contiguous along the channels; no program waits for another, there
are no atomics, and the order of summation, and so every bit, is the same on every run. Block sizes
are chosen by shape alone and not by timing, which could choose, and so round, differently.

Offsets into the features are 64 bit, as they derive from the int64 edge indices.
"""

# Annotations are not postponed: Triton 3.0's interpreter knows a constexpr by the live annotation.
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairchem_kd.ops.cpu import accumulator
from fairchem_kd.ops.order import EdgeOrder

# said, because its default changes between releases, and with it the last bits of every sum
_OPTIONS = {"enable_fp_fusion": True}
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _edges_at(perm, places, inside, HAS_PERM: tl.constexpr):
    """The edges at these places of the order; out of place, edge 0."""
    if HAS_PERM:
        return tl.load(perm + places, mask=inside, other=0)
    else:
        return places


@triton.jit
def _nodes_kernel(
    features, vectors, perm, offsets, out, channels, stride, blocks,
    HAS_PERM: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr, MEAN: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    atom = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = column < channels
    begin = tl.load(offsets + atom)
    end = tl.load(offsets + atom + 1)
    s = tl.zeros([BLOCK_C], dtype=TYPE)
    x = tl.zeros([BLOCK_C], dtype=TYPE)
    y = tl.zeros([BLOCK_C], dtype=TYPE)
    z = tl.zeros([BLOCK_C], dtype=TYPE)
    places = begin + tl.arange(0, BLOCK_E)
    edge = _edges_at(perm, places, places < end, HAS_PERM)
    for _ in range(((end - begin).to(tl.int32) + BLOCK_E - 1) // BLOCK_E):
        inside = places < end
        row = tl.load(
            features + edge[:, None] * stride + column[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        ).to(TYPE)
        if VECTOR:
            u = vectors + edge * 3
            x += tl.sum(row * tl.load(u, mask=inside, other=0.0).to(TYPE)[:, None], axis=0)
            y += tl.sum(row * tl.load(u + 1, mask=inside, other=0.0).to(TYPE)[:, None], axis=0)
            z += tl.sum(row * tl.load(u + 2, mask=inside, other=0.0).to(TYPE)[:, None], axis=0)
        if SCALAR:
            s += tl.sum(row, axis=0)
        places += BLOCK_E
        # asked for one step ahead, so that the features need not wait for it
        edge = _edges_at(perm, places, places < end, HAS_PERM)
    if MEAN:
        degree = tl.maximum(end - begin, 1).to(TYPE)
        s /= degree
        x /= degree
        y /= degree
        z /= degree
    to = out + atom * ((SCALAR + 3 * VECTOR) * channels) + column
    if SCALAR:
        tl.store(to, s.to(out.dtype.element_ty), mask=in_row)
        to += channels
    if VECTOR:
        tl.store(to, x.to(out.dtype.element_ty), mask=in_row)
        tl.store(to + channels, y.to(out.dtype.element_ty), mask=in_row)
        tl.store(to + 2 * channels, z.to(out.dtype.element_ty), mask=in_row)


@triton.jit
def _edges_kernel(
    nodes, vectors, perm, offsets, out, channels, stride, component, blocks,
    HAS_PERM: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr, MEAN: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    atom = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = column < channels
    begin = tl.load(offsets + atom)
    end = tl.load(offsets + atom + 1)
    # the atom's rows stay in registers for all of its edges
    s = tl.zeros([BLOCK_C], dtype=TYPE)
    x = tl.zeros([BLOCK_C], dtype=TYPE)
    y = tl.zeros([BLOCK_C], dtype=TYPE)
    z = tl.zeros([BLOCK_C], dtype=TYPE)
    at = nodes + atom * stride + column
    if SCALAR:
        s = tl.load(at, mask=in_row, other=0.0).to(TYPE)
        at += component
    if VECTOR:
        x = tl.load(at, mask=in_row, other=0.0).to(TYPE)
        y = tl.load(at + component, mask=in_row, other=0.0).to(TYPE)
        z = tl.load(at + 2 * component, mask=in_row, other=0.0).to(TYPE)
    if MEAN:
        degree = tl.maximum(end - begin, 1).to(TYPE)
        s /= degree
        x /= degree
        y /= degree
        z /= degree
    places = begin + tl.arange(0, BLOCK_E)
    edge = _edges_at(perm, places, places < end, HAS_PERM)
    for _ in range(((end - begin).to(tl.int32) + BLOCK_E - 1) // BLOCK_E):
        inside = places < end
        row = tl.zeros([BLOCK_E, BLOCK_C], dtype=TYPE)
        if SCALAR:
            row += s[None, :]
        if VECTOR:
            u = vectors + edge * 3
            row += tl.load(u, mask=inside, other=0.0).to(TYPE)[:, None] * x[None, :]
            row += tl.load(u + 1, mask=inside, other=0.0).to(TYPE)[:, None] * y[None, :]
            row += tl.load(u + 2, mask=inside, other=0.0).to(TYPE)[:, None] * z[None, :]
        tl.store(
            out + edge[:, None] * channels + column[None, :],
            row.to(out.dtype.element_ty),
            mask=inside[:, None] & in_row[None, :],
        )
        places += BLOCK_E
        edge = _edges_at(perm, places, places < end, HAS_PERM)


@triton.jit
def _dots_kernel(
    features, nodes, perm, offsets, out, channels, stride, node_stride, component,
    HAS_PERM: tl.constexpr, MEAN: tl.constexpr,
    TYPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + atom)
    end = tl.load(offsets + atom + 1)
    degree = tl.maximum(end - begin, 1).to(TYPE)
    places = begin + tl.arange(0, BLOCK_E)
    edge = _edges_at(perm, places, places < end, HAS_PERM)
    for _ in range(((end - begin).to(tl.int32) + BLOCK_E - 1) // BLOCK_E):
        inside = places < end
        x = tl.zeros([BLOCK_E, BLOCK_C], dtype=TYPE)
        y = tl.zeros([BLOCK_E, BLOCK_C], dtype=TYPE)
        z = tl.zeros([BLOCK_E, BLOCK_C], dtype=TYPE)
        for first in range(0, channels, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            in_row = column < channels
            row = tl.load(
                features + edge[:, None] * stride + column[None, :],
                mask=inside[:, None] & in_row[None, :],
                other=0.0,
            ).to(TYPE)
            at = nodes + atom * node_stride + column
            x += row * tl.load(at, mask=in_row, other=0.0).to(TYPE)[None, :]
            y += row * tl.load(at + component, mask=in_row, other=0.0).to(TYPE)[None, :]
            z += row * tl.load(at + 2 * component, mask=in_row, other=0.0).to(TYPE)[None, :]
        to = out + edge * 3
        x1, y1, z1 = tl.sum(x, axis=1), tl.sum(y, axis=1), tl.sum(z, axis=1)
        if MEAN:
            x1 /= degree
            y1 /= degree
            z1 /= degree
        tl.store(to, x1.to(out.dtype.element_ty), mask=inside)
        tl.store(to + 1, y1.to(out.dtype.element_ty), mask=inside)
        tl.store(to + 2, z1.to(out.dtype.element_ty), mask=inside)
        places += BLOCK_E
        edge = _edges_at(perm, places, places < end, HAS_PERM)


def nodes(
    features: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    features = _rows(features)
    channels, num_nodes = features.shape[1], order.num_nodes
    block_c, block_e, warps = block_sizes(channels, features.element_size(), num_nodes)
    blocks = triton.cdiv(channels, block_c)
    rows = scalar + (0 if vectors is None else 3)
    out = features.new_empty(num_nodes, rows, channels, dtype=dtype)
    with _device_of(features):
        _nodes_kernel[(num_nodes * blocks,)](
            features, features if vectors is None else vectors.contiguous(),
            order.offsets if order.perm is None else order.perm, order.offsets, out,
            channels, features.stride(0), blocks,
            HAS_PERM=order.perm is not None, SCALAR=scalar, VECTOR=vectors is not None, MEAN=mean,
            TYPE=_TYPES[accumulator(features.dtype, dtype)],
            BLOCK_C=block_c, BLOCK_E=block_e, num_warps=warps, **_OPTIONS,
        )  # fmt: skip
    return out


def edges(
    nodes: Tensor, vectors: Tensor | None, order: EdgeOrder,
    scalar: bool, mean: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    nodes = _rows(nodes)
    channels, num_nodes = nodes.shape[2], order.num_nodes
    out = nodes.new_empty(order.num_edges, channels, dtype=dtype)
    block_c, block_e, warps = block_sizes(channels, out.element_size(), num_nodes)
    blocks = triton.cdiv(channels, block_c)
    with _device_of(nodes):
        _edges_kernel[(num_nodes * blocks,)](
            nodes, nodes if vectors is None else vectors.contiguous(),
            order.offsets if order.perm is None else order.perm, order.offsets, out,
            channels, nodes.stride(0), nodes.stride(1), blocks,
            HAS_PERM=order.perm is not None, SCALAR=scalar, VECTOR=vectors is not None, MEAN=mean,
            TYPE=_TYPES[accumulator(nodes.dtype, dtype)],
            BLOCK_C=block_c, BLOCK_E=block_e, num_warps=warps, **_OPTIONS,
        )  # fmt: skip
    return out


def dots(
    features: Tensor, nodes: Tensor, order: EdgeOrder, mean: bool, dtype: torch.dtype
) -> Tensor:
    features, nodes = _rows(features), _rows(nodes)
    channels = features.shape[1]
    out = features.new_empty(order.num_edges, 3, dtype=dtype)
    with _device_of(features):
        # a warp per row of the tile: the sum over the channels stays within it
        _dots_kernel[(order.num_nodes,)](
            features, nodes, order.offsets if order.perm is None else order.perm, order.offsets,
            out, channels, features.stride(0), nodes.stride(0), nodes.stride(1),
            HAS_PERM=order.perm is not None, MEAN=mean,
            TYPE=_TYPES[accumulator(features.dtype, nodes.dtype, dtype)],
            BLOCK_C=min(max(triton.next_power_of_2(channels), 16), 128), BLOCK_E=16, num_warps=4,
            **_OPTIONS,
        )  # fmt: skip
    return out


def block_sizes(channels: int, itemsize: int, num_nodes: int) -> tuple[int, int, int]:
    """Channels and edges in a tile, and warps, for rows of ``itemsize`` bytes a channel.

    A warp reads 16 bytes a thread, 512 bytes of one row, at once; where rows are shorter, several
    of them. A tile has eight such reads per thread: enough in flight to keep the memory busy, few
    enough to stay in registers. As many warps as a row needs, up to four; with few atoms one, so
    that more programs share the work evenly. Neither changes the order of summation.
    """
    per_warp = 512 // itemsize
    block_c = min(max(triton.next_power_of_2(channels), 16), 4 * per_warp)
    while block_c > per_warp and num_nodes * triton.cdiv(channels, block_c) < 4096:
        block_c //= 2
    rows_at_once = max(per_warp // block_c, 1)
    return block_c, min(8 * rows_at_once, 32), max(block_c // per_warp, 1)


def _rows(tensor: Tensor) -> Tensor:
    """With adjacent channels; the other strides may be any."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
