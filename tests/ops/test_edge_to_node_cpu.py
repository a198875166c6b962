"""On CPU: which sums of edge_to_node take which way, and with how many threads."""

from __future__ import annotations

import pytest
import torch
from edge_sums import TAKES_PLAIN, Recorder, graph, reference
from edge_sums import way as way

from fairchem_kd.ops import cpu, edge_to_node


def test_sorted_edges_give_the_same_bits_with_any_number_of_threads():
    features, _, target = graph(90, 6, 24, dtype=torch.float32)
    target = target.sort().values
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(edge_to_node(features, target, 6))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("numbers", "is_sorted", "threads", "plain"),
    [
        (2**20, False, 1, True),  # small
        (2**23, False, 1, False),
        (2**23, True, 1, True),  # nothing to gain from one thread either
        (2**23, True, 2, False),
        (2**22, False, 2, False),
    ],
)
def test_which_sums_on_cpu_are_left_to_pytorch(numbers, is_sorted, threads, plain, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    features = torch.empty(numbers // 64, 64, device="meta")
    assert TAKES_PLAIN(features, is_sorted) is plain


def test_small_sums_on_cpu_sort_nothing(way):
    features, vectors, target = graph(20, 4, 6)
    with Recorder() as seen:
        edge_to_node(features, target, 4)
    assert any("edge_sum" in name or "sort" in name for name in seen.names) == (way != "plain")
    with Recorder() as seen:  # the vectors of a small graph take the operator
        edge_to_node(features, target, 4, edge_vectors=vectors)
    assert "edge_sum_nodes" in seen.names


def test_many_long_rows(monkeypatch):
    """On CPU, these take MKL's product where it is there."""
    features, _, target = graph(90, 6, 24)
    monkeypatch.setattr(cpu, "MKL_FROM_CHANNELS", 24)
    monkeypatch.setattr(cpu, "MKL_FROM_NUMBERS", 24 * 90)
    want, _ = reference(features, target, 6, features[:, :3], "mean")
    got = edge_to_node(features, target, 6, reduce="mean")
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
