"""The sums of edge_to_node against loops in float64."""

from __future__ import annotations

import pytest
import torch
from edge_sums import DEVICE, INTERPRETED, graph, reference
from edge_sums import way as way

from fairchem_kd.ops import edge_to_node


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(
    ("num_edges", "num_nodes", "channels"), [(1, 1, 1), (40, 7, 5), (5, 30, 3), (200, 3, 1)]
)
def test_equals_loops(num_edges, num_nodes, channels, reduce):
    features, vectors, target = graph(num_edges, num_nodes, channels)
    scalar, vector = reference(features, target, num_nodes, vectors, reduce)
    alone = edge_to_node(features, target, num_nodes, reduce=reduce)
    both = edge_to_node(features, target, num_nodes, edge_vectors=vectors, reduce=reduce)
    torch.testing.assert_close(alone, scalar, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(both[0], scalar, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(both[1], vector, rtol=1e-13, atol=1e-13)


def test_atoms_without_edges_get_zeros():
    features, vectors, _ = graph(6, 1, 4)
    target = torch.tensor([5, 2, 2, 5, 5, 2])
    scalar, vector = edge_to_node(features, target, 8, edge_vectors=vectors, reduce="mean")
    empty = [0, 1, 3, 4, 6, 7]
    assert scalar.shape == (8, 4)
    assert vector.shape == (8, 3, 4)
    assert not scalar[empty].any()
    assert not vector[empty].any()
    assert scalar[[2, 5]].all()


def test_the_order_of_edges_does_not_matter():
    features, vectors, target = graph(300, 20, 6)
    shuffled = torch.randperm(300, generator=torch.Generator(DEVICE).manual_seed(1))
    first = edge_to_node(features, target, 20, edge_vectors=vectors)
    second = edge_to_node(features[shuffled], target[shuffled], 20, edge_vectors=vectors[shuffled])
    in_order = target.argsort(stable=True)
    third = edge_to_node(features[in_order], target[in_order], 20, edge_vectors=vectors[in_order])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert torch.equal(a, c)  # a stable sort leaves the order of summation as it is


def test_linear_projection_commutes_with_the_sum():
    features, _, target = graph(50, 6, 4)
    weight = torch.randn(
        3, 4, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(2)
    )
    projected_first = edge_to_node(features @ weight.T, target, 6)
    torch.testing.assert_close(projected_first, edge_to_node(features, target, 6) @ weight.T)


def test_repeats_are_bit_equal():
    num_nodes = 5 if INTERPRETED else 40
    features, vectors, target = graph(40 * num_nodes, num_nodes, 16, dtype=torch.float32)
    results = []
    for _ in range(3):
        f, u = features.clone().requires_grad_(), vectors.clone().requires_grad_()
        scalar, vector = edge_to_node(f, target, num_nodes, edge_vectors=u)
        (scalar.square().sum() + vector.pow(3).sum()).backward()
        results.append((scalar, vector, f.grad, u.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="the default device is the one of this run")
def test_the_default_device_may_be_another():
    features, vectors, target = graph(20, 4, 3)
    want = edge_to_node(features, target, 4, edge_vectors=vectors)
    alone = edge_to_node(features, target, 4)
    with torch.device("meta"):
        got = edge_to_node(features, target, 4, edge_vectors=vectors)
        assert torch.equal(edge_to_node(features, target, 4), alone)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("num_edges", "num_nodes", "channels"), [(0, 4, 3), (0, 0, 3), (5, 4, 0)])
def test_empty_graphs_stay_connected(num_edges, num_nodes, channels):
    features = torch.zeros(num_edges, channels, requires_grad=True)
    vectors = torch.ones(num_edges, 3, requires_grad=True)
    target = torch.zeros(num_edges, dtype=torch.long)
    scalar, vector = edge_to_node(features, target, num_nodes, edge_vectors=vectors)
    assert scalar.shape == (num_nodes, channels)
    assert vector.shape == (num_nodes, 3, channels)
    (scalar.sum() + vector.sum()).backward()
    assert features.grad.shape == features.shape
    assert vectors.grad.shape == vectors.shape
    assert not vectors.grad.any()


def test_inputs_need_not_be_contiguous():
    features, vectors, target = graph(30, 4, 6)
    strided = features.t().contiguous().t()
    expanded = features[:, :1].expand(-1, 6)
    assert torch.equal(edge_to_node(strided, target, 4), edge_to_node(features, target, 4))
    want = edge_to_node(expanded.contiguous(), target, 4, edge_vectors=vectors)
    got = edge_to_node(expanded, target, 4, edge_vectors=vectors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
