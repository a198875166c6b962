"""Structures are dealt out to ranks as stock does it, at once."""

from __future__ import annotations

import ast
import heapq
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fairchem.core.common import data_parallel

from fairchem_kd.stock.partition import balanced_partition, use_our_partition


def stock_partition() -> Callable[[np.ndarray, int], list[list[int]]]:
    """Stock's own, read from its source: not compiled, and whatever has been put in its place."""
    module = ast.parse(inspect.getsource(data_parallel))
    (function,) = (
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "_balanced_partition"
    )
    function.decorator_list.clear()
    space: dict[str, Any] = {"np": np, "heapq": heapq, "NDArray": np.ndarray}
    exec("from __future__ import annotations\n" + ast.unparse(function), space)
    return space["_balanced_partition"]


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("count", [8, 9, 31])
def test_sizes_that_differ_are_dealt_out_as_stock_does(parts: int, count: int) -> None:
    sizes = np.random.default_rng(parts).permutation(200)[:count]
    assert balanced_partition(sizes, parts) == stock_partition()(sizes, parts)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_structure_has_one_rank_and_ranks_have_as_much(parts: int) -> None:
    sizes = np.array([7, 7, 7, 3, 3, 90, 7, 1, 1, 7])
    dealt = balanced_partition(sizes, parts)
    assert len(dealt) == parts
    assert sorted(index for part in dealt for index in part) == list(range(len(sizes)))
    loads = [sizes[part].sum() for part in dealt]
    assert max(loads) - min(loads) <= sizes.max()
    assert dealt == balanced_partition(sizes, parts)


def test_of_one_size_the_first_comes_first() -> None:
    """Whatever the machine: all ranks deal out for themselves, and must agree."""
    assert sorted(balanced_partition(np.full(6, 4), 2)) == [[0, 2, 4], [1, 3, 5]]
    assert sorted(balanced_partition(np.full(40, 4), 40)) == [[index] for index in range(40)]


def test_no_rank_compiles_when_it_draws_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "_balanced_partition", None)
    use_our_partition()
    assert data_parallel._balanced_partition is balanced_partition
