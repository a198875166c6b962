"""edge_to_node against loops in float64, on both of its ways of computing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_kd.ops import edge_to_node

MODULE = sys.modules["fairchem_kd.ops.edge_to_node"]


@pytest.fixture(params=["cpu", "segments"], autouse=True)
def way(request, monkeypatch):
    """Every test runs with the CPU's way and with the one for other devices."""
    if request.param == "segments":
        monkeypatch.setattr(MODULE, "_nodes_cpu", MODULE._nodes_segments)
        monkeypatch.setattr(MODULE, "_edges_cpu", MODULE._edges_gather)
    return request.param


def reference(features, target, num_nodes, vectors, reduce):
    scalar = torch.zeros(num_nodes, features.shape[1], dtype=torch.float64)
    vector = torch.zeros(num_nodes, 3, features.shape[1], dtype=torch.float64)
    degree = [0] * num_nodes
    for e, i in enumerate(target.tolist()):
        degree[i] += 1
        scalar[i] += features[e].double()
        for k in range(3):
            vector[i, k] += vectors[e, k].double() * features[e].double()
    if reduce == "mean":
        for i in range(num_nodes):
            scalar[i] /= max(degree[i], 1)
            vector[i] /= max(degree[i], 1)
    return scalar, vector


def graph(num_edges, num_nodes, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_edges, channels, generator=generator, dtype=torch.float64)
    vectors = torch.randn(num_edges, 3, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    target = torch.randint(num_nodes, (num_edges,), generator=generator)
    return features.to(dtype), vectors.to(dtype), target


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
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first = edge_to_node(features, target, 20, edge_vectors=vectors)
    second = edge_to_node(features[shuffled], target[shuffled], 20, edge_vectors=vectors[shuffled])
    in_order = target.argsort(stable=True)
    third = edge_to_node(features[in_order], target[in_order], 20, edge_vectors=vectors[in_order])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert torch.equal(a, c)  # a stable sort leaves the order of summation as it is


def test_linear_projection_commutes_with_the_sum():
    features, _, target = graph(50, 6, 4)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    projected_first = edge_to_node(features @ weight.T, target, 6)
    torch.testing.assert_close(projected_first, edge_to_node(features, target, 6) @ weight.T)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("with_vectors", [False, True])
def test_first_and_second_derivatives(reduce, with_vectors):
    features, vectors, _ = graph(7, 1, 2)
    target = torch.tensor([3, 0, 3, 1, 0, 4, 3])
    features.requires_grad_()
    if with_vectors:
        vectors.requires_grad_()

        def run(f, u):
            return edge_to_node(f, target, 6, edge_vectors=u, reduce=reduce)

        inputs = (features, vectors)
    else:

        def run(f):
            return edge_to_node(f, target, 6, reduce=reduce).pow(2)

        inputs = (features,)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_third_derivative_equals_dense_algebra():
    features, vectors, target = graph(6, 3, 2)
    features.requires_grad_()
    vectors.requires_grad_()
    onto = torch.nn.functional.one_hot(target, 3).double()

    def third(vector_sum):
        value = vector_sum.pow(4).sum()
        (first,) = torch.autograd.grad(value, vectors, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), features, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), [features, vectors])

    ours = third(edge_to_node(features, target, 3, edge_vectors=vectors)[1])
    dense = third(torch.einsum("en,ek,ec->nkc", onto, vectors, features))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradient_of_half_types_keeps_their_type():
    features, vectors, target = graph(9, 4, 3, dtype=torch.bfloat16)
    features.requires_grad_()
    vectors.requires_grad_()
    scalar, vector = edge_to_node(features, target, 4, edge_vectors=vectors)
    (scalar.sum() + vector.sum()).backward()
    assert features.grad.dtype == vectors.grad.dtype == torch.bfloat16
    expected = 1 + vectors.detach().float().sum(1, keepdim=True).expand(-1, 3)
    torch.testing.assert_close(features.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_repeats_are_bit_equal():
    features, vectors, target = graph(2000, 40, 16, dtype=torch.float32)
    results = []
    for _ in range(3):
        f, u = features.clone().requires_grad_(), vectors.clone().requires_grad_()
        scalar, vector = edge_to_node(f, target, 40, edge_vectors=u)
        (scalar.square().sum() + vector.pow(3).sum()).backward()
        results.append((scalar, vector, f.grad, u.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_in_and_out(dtype):
    features, vectors, target = graph(60, 5, 4, dtype=dtype)
    scalar, vector = edge_to_node(features, target, 5, edge_vectors=vectors)
    assert scalar.dtype == vector.dtype == dtype
    expected = reference(features, target, 5, vectors, "sum")
    exact = [x.to(dtype) for x in expected]  # one rounding at the end
    eps = torch.finfo(dtype).eps
    for result, want in zip((scalar, vector), exact, strict=True):
        torch.testing.assert_close(result, want, rtol=2 * eps, atol=1e-5 if eps > 1e-10 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_accumulated_in_single_precision(dtype):
    # a running sum of ones in bfloat16 stops at 256, in float16 at 2048
    features = torch.ones(4096, 2, dtype=dtype)
    result = edge_to_node(features, torch.zeros(4096, dtype=torch.long), 1)
    assert result.tolist() == [[4096, 4096]]


def test_vectors_of_another_type_than_the_features():
    features, vectors, target = graph(30, 4, 3)
    _, vector = edge_to_node(features.half(), target, 4, edge_vectors=vectors)
    assert vector.dtype == torch.float16
    want = reference(features.half(), target, 4, vectors, "sum")[1]
    torch.testing.assert_close(vector.double(), want, rtol=2e-3, atol=2e-3)


def test_autocast_does_not_lower_the_precision():
    features, vectors, target = graph(60, 5, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = edge_to_node(features, target, 5, edge_vectors=vectors)
    outside = edge_to_node(features, target, 5, edge_vectors=vectors)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


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


class _Recorder(TorchDispatchMode):
    """Names of the operations that run, and the largest floating-point result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                dense = tensor if tensor.layout == torch.strided else tensor.values()
                self.largest = max(self.largest, dense.numel())
        return result


def test_no_edge_vector_tensor_and_no_atomics(way):
    num_edges, channels = 500, 32
    features, vectors, target = graph(num_edges, 10, channels, dtype=torch.float32)
    features.requires_grad_()
    vectors.requires_grad_()
    with _Recorder() as seen:
        scalar, vector = edge_to_node(features, target, 10, edge_vectors=vectors)
        loss = scalar.square().sum() + vector.square().sum()
        first = torch.autograd.grad(loss, [features, vectors], create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert num_edges * channels <= seen.largest < 2 * num_edges * channels
    # on CPU, index_put (not accumulating) places the integers and weights of the CSR matrix
    atomics = ("index_add", "scatter", "embedding", "index_reduce", "index_put")
    allowed = {"index_put_"} if way == "cpu" else set()
    assert {name for name in seen.names if name.lstrip("_").startswith(atomics)} <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    features, vectors, target = graph(20000, 300, 64, dtype=dtype)
    want = reference(features[:500], target[:500], 300, vectors[:500], "sum")
    f, u, t = (x[:500].cuda() for x in (features, vectors, target))
    got = edge_to_node(f, t, 300, edge_vectors=u)
    for a, b in zip(got, want, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a.double().cpu(), b, rtol=4 * eps, atol=1e-5)
    repeats = []
    for _ in range(3):
        f = features.cuda().requires_grad_()
        u = vectors.cuda().requires_grad_()
        scalar, vector = edge_to_node(f, target.cuda(), 300, edge_vectors=u)
        (scalar.square().sum() + vector.square().sum()).backward()
        repeats.append((scalar, vector, f.grad, u.grad))
    for other in repeats[1:]:
        assert all(torch.equal(a, b) for a, b in zip(repeats[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edge_features": torch.zeros(4)}, ValueError, r"must be \(E, C\)"),
        ({"edge_features": torch.zeros(4, 2, dtype=torch.long)}, TypeError, "floating point"),
        ({"target_index": torch.zeros(3, dtype=torch.long)}, ValueError, r"must be \(4,\)"),
        ({"target_index": torch.zeros(4, 1, dtype=torch.long)}, ValueError, r"must be \(4,\)"),
        ({"target_index": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
        ({"target_index": torch.tensor([0, 1, 2, 3])}, ValueError, r"has 3, outside \[0, 3\)"),
        ({"target_index": torch.tensor([0, -1, 2, 1])}, ValueError, r"has -1, outside \[0, 3\)"),
        ({"num_nodes": 0}, ValueError, "4 edges cannot end on num_nodes=0"),
        ({"num_nodes": -1}, ValueError, "num_nodes=-1"),
        ({"edge_vectors": torch.zeros(4, 2)}, ValueError, r"edge_vectors must be \(4, 3\)"),
        ({"edge_vectors": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "floating point"),
        ({"edge_vectors": torch.zeros(4, 3, device="meta")}, ValueError, "several devices"),
        ({"reduce": "max"}, ValueError, "'sum' or 'mean', not 'max'"),
    ],
)
def test_wrong_inputs(change, error, message):
    given = {
        "edge_features": torch.zeros(4, 2),
        "target_index": torch.zeros(4, dtype=torch.long),
        "num_nodes": 3,
        "edge_vectors": None,
        "reduce": "sum",
    } | change
    with pytest.raises(error, match=message):
        edge_to_node(given.pop("edge_features"), given.pop("target_index"), **given)
