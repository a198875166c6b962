"""The order of a graph's edges by target atom: sorted once, shared by every sum over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EdgeOrder(NamedTuple):
    """A graph's edges by target atom (the CSR order); made by `edge_order`.

    One is good for every `edge_to_node` over the same ``target_index``, in any number of forwards
    and backwards.
    """

    target: Tensor  # (E,) target atom of each edge, as given
    perm: Tensor | None  # (E,) edges, stably sorted by target atom; None: they are sorted as given
    offsets: Tensor  # (N + 1,) where the edges of each atom begin in perm

    @property
    def num_edges(self) -> int:
        return self.target.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.offsets.shape[0] - 1


def edge_order(
    target_index: Tensor, num_nodes: int, *, is_sorted: bool = False, check: bool | None = None
) -> EdgeOrder:
    """The order of edges by target atom, to be shared by all sums over one graph.

    Never waits for the device, unless a check is asked for there.

    Args:
        target_index: ``(E,)``, int64, row 1 of ``edge_index``, each in ``[0, num_nodes)``.
        num_nodes: N.
        is_sorted: promises that ``target_index`` ascends, which saves the sort. On CPU this is
            found out, so the promise is of use elsewhere.
        check: whether to look at the values of ``target_index``. None: on CPU, and under
            ``torch.autograd.detect_anomaly``; elsewhere looking would wait for the device. The sums
            of an index out of range that nobody looks for are undefined, but touch no other memory.

    Raises:
        ValueError: for a wrong shape, an index out of range, or a wrong promise.
        TypeError: for a wrong type of number.
    """
    if target_index.dim() != 1:
        raise ValueError(f"target_index must be (E,), not {tuple(target_index.shape)}")
    if target_index.dtype != torch.int64:
        raise TypeError(f"target_index must be int64, not {target_index.dtype}")
    _check_number(target_index, num_nodes)
    target = target_index.contiguous()
    looked = looks_at_values(target, check)
    if looked:
        check_range(target, num_nodes)
        ascends = bool((target[1:] >= target[:-1]).all())
        if is_sorted and not ascends:
            raise ValueError("target_index does not ascend, although is_sorted=True")
        is_sorted = ascends
    # A radix sort takes one pass per 8 bits. Clamped, so that no wrong index wraps to a right one.
    small = torch.int16 if num_nodes < 2**15 else torch.int32 if num_nodes < 2**31 else torch.int64
    keys = target.clamp(-1, num_nodes).to(small)
    if not looked:  # what gathers by it must stay inside
        target = target.clamp(0, max(num_nodes - 1, 0))
    perm = None
    if not is_sorted:
        keys, perm = torch.sort(keys, stable=True)
    atoms = torch.arange(num_nodes + 1, device=target.device, dtype=small)
    return EdgeOrder(target, perm, torch.searchsorted(keys, atoms))


def looks_at_values(index: Tensor, check: bool | None) -> bool:
    """Whether to check the values of ``index``: never by default where that waits for a device."""
    if torch.compiler.is_compiling():
        return False
    if check is None:
        return index.device.type == "cpu" or torch.is_anomaly_enabled()
    return check


def check_range(target: Tensor, num_nodes: int) -> None:
    """Refuse target atoms outside ``[0, num_nodes)``; waits for the device."""
    _check_number(target, num_nodes)
    if target.shape[0] == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(target))
    if low < 0 or high >= num_nodes:
        raise ValueError(f"target_index has {low if low < 0 else high}, outside [0, {num_nodes})")


def _check_number(target: Tensor, num_nodes: int) -> None:
    if num_nodes < 0 or (num_nodes == 0 and target.shape[0] > 0):
        raise ValueError(f"{target.shape[0]} edges cannot end on num_nodes={num_nodes}")
