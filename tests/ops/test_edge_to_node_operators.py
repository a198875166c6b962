"""edge_to_node's operators: what they allocate, and that torch can register and compile them."""

from __future__ import annotations

import pytest
import torch
from edge_sums import DEVICE, INTERPRETED, Recorder, graph
from edge_sums import way as way

from fairchem_kd.ops import edge_order, edge_to_node, operators


@pytest.mark.parametrize("is_sorted", [False, True])
def test_no_edge_vector_tensor_and_no_atomics(way, is_sorted):
    num_edges, channels = 500, 32
    features, vectors, target = graph(num_edges, 10, channels, dtype=torch.float32)
    order = edge_order(target.sort().values if is_sorted else target, 10)
    grad = torch.randn(10, 4, channels)
    backend = operators.backend_for(DEVICE)
    with Recorder() as forward:
        backend.nodes(features, vectors, order, True, True, torch.float32)
    with Recorder() as backward:
        backend.edges(grad, vectors, order, True, True, torch.float32)
        backend.dots(features, grad[:, 1:], order, True, torch.float32)
    # the fallback holds one product at a time (and Triton's interpreter its own copy)
    limit = 4 * 10 * channels if way == "cpu" else num_edges * channels
    assert forward.largest <= max(limit, 4 * num_edges)
    assert backward.largest <= num_edges * channels
    atomics = ("index_add", "scatter", "embedding", "index_reduce", "index_put")
    names = forward.names | backward.names
    assert not {name for name in names if name.lstrip("_").startswith(atomics)}


@pytest.mark.skipif(INTERPRETED, reason="the same for every way, and slow in the interpreter")
@pytest.mark.parametrize("with_vectors", [False, True])
def test_operators_are_registered_as_torch_wants(with_vectors):
    features, vectors, target = graph(12, 4, 3)
    order = edge_order(target, 4)
    nodes = torch.randn(4, 4 if with_vectors else 1, 3, dtype=torch.float64)
    u = vectors.requires_grad_() if with_vectors else None
    dense = features.requires_grad_()
    args = (u, *order, True, True, torch.float64)
    torch.library.opcheck(operators.nodes_op, (dense, *args))
    torch.library.opcheck(operators.edges_op, (nodes.requires_grad_(), *args))
    if with_vectors:
        grad = nodes.detach()[:, 1:].requires_grad_()
        torch.library.opcheck(operators.dots_op, (dense, grad, *order, False, torch.float64))


@pytest.mark.skipif(INTERPRETED, reason="the same for every way, and slow in the interpreter")
def test_compiles_without_a_break():
    def loss(f, u, target, num_nodes, order=None):
        scalar, vector = edge_to_node(
            f, target, num_nodes, edge_vectors=u, reduce="mean", order=order
        )
        return scalar.square().sum() + vector.pow(3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_edges, num_nodes in ((40, 7), (25, 5)):
        features, vectors, target = graph(num_edges, num_nodes, 4)
        features.requires_grad_()
        vectors.requires_grad_()
        order = edge_order(target, num_nodes)
        want = loss(features, vectors, target, num_nodes)
        want_grads = torch.autograd.grad(want, [features, vectors])
        for plan in (None, order):
            got = compiled(features, vectors, target, num_nodes, plan)
            torch.testing.assert_close(got, want)
            grads = torch.autograd.grad(got, [features, vectors])
            torch.testing.assert_close(grads, want_grads)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 12 GB")
def test_more_values_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free memory on the GPU")
    channels = 512
    num_edges = 2**31 // channels + 1000
    features = torch.zeros(num_edges, channels, dtype=torch.bfloat16)
    features[-1000:] = 1
    target = torch.arange(num_edges) // 40
    num_nodes = num_edges // 40 + 1
    result = edge_to_node(features, target, num_nodes, out_dtype=torch.float32)
    assert result[: -1000 // 40 - 2].count_nonzero() == 0
    assert result.sum().item() == 1000 * channels
    del features
    grad = edges_of(result[:, None].bfloat16(), target, num_nodes)
    assert torch.equal(grad[-1], result[-1].bfloat16())


def edges_of(nodes, target, num_nodes):
    order = edge_order(target, num_nodes)
    return operators.edges_op(nodes, None, *order, True, False, nodes.dtype)
