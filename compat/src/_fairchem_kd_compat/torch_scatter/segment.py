"""Reductions over a sorted index or over row pointers; no host synchronisation on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .scatter import _refuse_out, scatter


def segment_coo(
    src: Tensor,
    index: Tensor,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce ``src`` along the last dimension of the sorted ``index``, as `scatter` would."""
    _refuse_out(out, "segment_coo")
    return scatter(src, _leading(index, src), index.dim() - 1, None, dim_size, reduce)


def segment_csr(
    src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """Reduce the ranges ``indptr[i]:indptr[i + 1]`` of ``src`` along the last dim of ``indptr``.

    Elements before the first pointer and after the last belong to no range.
    """
    _refuse_out(out, "segment_csr")
    dim = indptr.dim() - 1
    segments = indptr.size(dim) - 1
    indptr = indptr.expand(*src.shape[:dim], -1).contiguous()
    place = torch.arange(src.size(dim), device=src.device, dtype=indptr.dtype)
    place = place.expand(*src.shape[:dim], -1).contiguous()
    # 0 and segments + 1 collect what lies outside of every range.
    index = torch.searchsorted(indptr, place, right=True)
    result = scatter(src, index, dim, None, segments + 2, reduce)
    return result.narrow(dim, 1, segments)


def _leading(index: Tensor, src: Tensor) -> Tensor:
    return index.expand(src.shape[: index.dim()])
