"""Reductions over an unsorted index.

Empty places hold 0 (1 for ``mul``). ``min`` and ``max`` hand their gradient to one element, the
first of those that are equal, as the compiled extension does on a CPU; unlike it, they pass NaN on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .utils import broadcast


def _output_size(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> list[int]:
    size = list(src.shape)
    if dim_size is not None:
        size[dim] = int(dim_size)
    else:
        size[dim] = int(index.max()) + 1 if index.numel() else 0
    return size


def _sum(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> Tensor:
    index = broadcast(index, src, dim)
    out = src.new_zeros(_output_size(src, index, dim, dim_size))
    return out.scatter_add(dim, index, src)


def _mean(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> Tensor:
    total = _sum(src, index, dim, dim_size)
    # Counted in integers: a half-precision count would stop growing at 2048.
    axis = 0 if index.dim() == 1 else dim
    count = _sum(torch.ones_like(index, dtype=torch.long), index, axis, total.size(dim))
    count = broadcast(count.clamp(min=1), total, dim)
    if total.is_floating_point() or total.is_complex():
        return total / count.to(total.dtype)
    return torch.div(total, count, rounding_mode="floor").to(total.dtype)


def _mul(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> Tensor:
    index = broadcast(index, src, dim)
    out = src.new_ones(_output_size(src, index, dim, dim_size))
    return out.scatter_reduce(dim, index, src, reduce="prod")


def _extremum(
    src: Tensor, index: Tensor, dim: int, dim_size: int | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """Return the extreme values and the place of each along ``dim`` (its length where none is)."""
    index = broadcast(index, src, dim)
    size = _output_size(src, index, dim, dim_size)
    length = src.size(dim)
    with torch.no_grad():
        best = src.new_zeros(size)
        best = best.scatter_reduce(dim, index, src.detach(), reduce=reduce, include_self=False)
        best = best.gather(dim, index)
        hit = (src == best) | ((src != src) & (best != best))
        place = broadcast(torch.arange(length, device=src.device), src, dim)
        place = torch.where(hit, place, length)
        arg = torch.full(size, length, dtype=torch.long, device=src.device)
        arg = arg.scatter_reduce(dim, index, place, reduce="amin")
        empty = arg == length
    if length == 0:
        return src.new_zeros(size), arg
    out = src.gather(dim, arg.masked_fill(empty, 0)).masked_fill(empty, 0)
    return out, arg


def scatter_max(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the maxima over ``index`` and where along ``dim`` each comes from."""
    _refuse_out(out, "scatter_max")
    return _extremum(src, index, dim, dim_size, "amax")


def scatter_min(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the minima over ``index`` and where along ``dim`` each comes from."""
    _refuse_out(out, "scatter_min")
    return _extremum(src, index, dim, dim_size, "amin")


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce ``src`` along ``dim`` into the places that ``index`` names.

    ``index`` has the shape of ``src``, can be expanded to it, or is 1-d along ``dim``. The result
    has ``dim_size`` places along ``dim`` (default: the largest index plus one).

    Raises:
        NotImplementedError: ``out`` was given.
        ValueError: ``reduce`` is none of sum, add, mean, min, max and mul.
    """
    _refuse_out(out, "scatter")
    if reduce in ("min", "max"):
        return _extremum(src, index, dim, dim_size, f"a{reduce}")[0]
    functions = {"sum": _sum, "add": _sum, "mean": _mean, "mul": _mul}
    if reduce not in functions:
        raise ValueError(f"unknown reduce {reduce!r}: sum, add, mean, min, max or mul")
    return functions[reduce](src, index, dim, dim_size)


def _refuse_out(out: Tensor | None, name: str) -> None:
    if out is not None:
        raise NotImplementedError(
            f"{name}(out=...) is not in fairchem-kd-compat's stand-in; install torch_scatter for it"
        )
