"""edge_to_node against loops in float64, on each of its ways of computing.

On their own, these tests run the three ways on CPU. test_ops_triton.py runs them again with the
Triton kernels, in Triton's interpreter and, where there is one, on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_kd.ops import EdgeOrder, cpu, edge_order, edge_to_node, operators, segments

DEVICE = os.environ.get("EDGE_TO_NODE_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = os.environ.get("EDGE_TO_NODE_WAYS", "plain,cpu,segments").split(",")

TAKES_PLAIN = cpu.takes_plain


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Every test runs with each way of computing, on the device of this run."""
    if request.param == "triton":
        from fairchem_kd.ops import triton_kernels as backend
    else:
        backend = {"plain": cpu, "cpu": cpu, "segments": segments}[request.param]
    if DEVICE != "cpu":  # there, the choice is under test too
        assert operators.backend_for(DEVICE) is backend
    monkeypatch.setattr(operators, "backend_for", lambda device_type: backend)
    # every size here is small
    monkeypatch.setattr(cpu, "takes_plain", lambda *_, **__: request.param == "plain")
    previous = torch.get_default_device()
    torch.set_default_device(DEVICE)
    yield request.param
    torch.set_default_device(previous)


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
    generator = torch.Generator(DEVICE).manual_seed(seed)
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
    with _Recorder() as seen:
        edge_to_node(features, target, 4)
    assert any("edge_sum" in name or "sort" in name for name in seen.names) == (way != "plain")
    with _Recorder() as seen:  # the vectors of a small graph take the operator
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
    # in a random direction, where full matrices of derivatives would take minutes
    assert torch.autograd.gradcheck(run, inputs, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=INTERPRETED)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_edges", [1, 7, 300])
@pytest.mark.parametrize("channels", [1, 5, 64])
def test_half_types_are_rounded_once(num_edges, channels, dtype):
    features, _, target = graph(num_edges, 6, channels, dtype=dtype)
    for reduce in ("sum", "mean"):
        single = edge_to_node(features.float(), target, 6, reduce=reduce).to(dtype)
        assert_rounded_once(edge_to_node(features, target, 6, reduce=reduce), single)


def test_half_types_are_converted_where_pytorch_would_round_every_sum(monkeypatch):
    monkeypatch.setattr(cpu, "keeps_sums_in_float32", lambda dtype: False)
    features, _, target = graph(300, 6, 5, dtype=torch.bfloat16)
    single = edge_to_node(features.float(), target, 6).bfloat16()
    assert_rounded_once(edge_to_node(features, target, 6), single)


def assert_rounded_once(result, single):
    # another order of the sums in float32 may end on the neighbouring number
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result, single, rtol=eps, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the default device is the one of this run")
def test_the_default_device_may_be_another():
    features, vectors, target = graph(20, 4, 3)
    want = edge_to_node(features, target, 4, edge_vectors=vectors)
    alone = edge_to_node(features, target, 4)
    with torch.device("meta"):
        got = edge_to_node(features, target, 4, edge_vectors=vectors)
        assert torch.equal(edge_to_node(features, target, 4), alone)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_vectors_of_another_type_than_the_features():
    features, vectors, target = graph(30, 4, 3)
    _, vector = edge_to_node(features.half(), target, 4, edge_vectors=vectors)
    assert vector.dtype == torch.float16
    want = reference(features.half(), target, 4, vectors, "sum")[1]
    torch.testing.assert_close(vector.double(), want, rtol=2e-3, atol=2e-3)


def test_autocast_does_not_lower_the_precision():
    features, vectors, target = graph(60, 5, 4, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
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


@pytest.mark.parametrize("is_sorted", [False, True])
def test_no_edge_vector_tensor_and_no_atomics(way, is_sorted):
    num_edges, channels = 500, 32
    features, vectors, target = graph(num_edges, 10, channels, dtype=torch.float32)
    order = edge_order(target.sort().values if is_sorted else target, 10)
    grad = torch.randn(10, 4, channels)
    backend = operators.backend_for(DEVICE)
    with _Recorder() as forward:
        backend.nodes(features, vectors, order, True, True, torch.float32)
    with _Recorder() as backward:
        backend.edges(grad, vectors, order, True, True, torch.float32)
        backend.dots(features, grad[:, 1:], order, True, torch.float32)
    # the fallback holds one product at a time (and Triton's interpreter its own copy)
    limit = 4 * 10 * channels if way == "cpu" else num_edges * channels
    assert forward.largest <= max(limit, 4 * num_edges)
    assert backward.largest <= num_edges * channels
    atomics = ("index_add", "scatter", "embedding", "index_reduce", "index_put")
    names = forward.names | backward.names
    assert not {name for name in names if name.lstrip("_").startswith(atomics)}


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_shared_order_gives_the_same_bits(is_sorted):
    features, vectors, target = graph(120, 9, 5, dtype=torch.float32)
    target = target.sort().values if is_sorted else target
    order = edge_order(target, 9)
    assert (order.perm is None) == (is_sorted and DEVICE == "cpu")
    features.requires_grad_()
    alone = edge_to_node(features, target, 9, edge_vectors=vectors)
    with _Recorder() as seen:
        shared = edge_to_node(features, target, 9, edge_vectors=vectors, order=order)
        torch.autograd.grad(sum(x.square().sum() for x in shared), features)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert "edge_sum_nodes" in seen.names
    assert "edge_sum_edges" in seen.names
    assert not {name for name in seen.names if "sort" in name}


@pytest.mark.parametrize("num_nodes", [5, 2**15 + 5])  # with 16 and 32 bit keys
def test_order_is_the_stable_one(num_nodes):
    target = torch.tensor([4, 0, 4, 2, 0, num_nodes - 1, 2])
    order = edge_order(target, num_nodes)
    perm = target.argsort(stable=True)
    assert order.perm.tolist() == perm.tolist()
    counts = torch.bincount(target, minlength=num_nodes)
    assert torch.equal(order.offsets.diff(), counts)
    assert (order.num_edges, order.num_nodes) == (7, num_nodes)
    promised = edge_order(target[perm], num_nodes, is_sorted=True)
    assert promised.perm is None
    assert torch.equal(promised.offsets, order.offsets)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_an_index_that_nobody_looks_for_adds_to_no_atom():
    features, _, target = graph(50, 6, 3)
    wrong = target.clone()
    wrong[[3, 20, 30, 40]] = torch.tensor([-1, 6, 6 + 2**16, -(2**16)])
    features.requires_grad_()
    got = edge_to_node(features, wrong, 6, check=False)
    torch.autograd.grad(got.sum(), features)  # stays within memory
    rest = wrong == target
    assert torch.equal(got, edge_to_node(features[rest], target[rest], 6))
    for check in (True, None):
        with torch.autograd.detect_anomaly(check_nan=False), pytest.raises(ValueError):
            edge_to_node(features, wrong, 6, check=check)


def test_an_order_that_does_not_fit():
    features, _, target = graph(10, 4, 3)
    order = edge_order(target, 4)
    with pytest.raises(ValueError, match="of 10 edges onto 4 atoms, and not of 10 onto 5"):
        edge_to_node(features, target, 5, order=order)
    with pytest.raises(ValueError, match="of 10 edges onto 4 atoms, and not of 9 onto 4"):
        edge_to_node(features[1:], target[1:], 4, order=order)
    with pytest.raises(ValueError, match="of another target_index"):
        edge_to_node(features, target.flip(0), 4, order=order, check=True)
    elsewhere = EdgeOrder(*(x.to("meta") for x in (order.target, order.perm, order.offsets)))
    with pytest.raises(ValueError, match="the order is on meta"):
        edge_to_node(features, target, 4, order=elsewhere)
    with pytest.raises(ValueError, match="does not ascend"):
        edge_order(target, 4, is_sorted=True, check=True)
    with pytest.raises(ValueError, match=r"must be \(E,\)"):
        edge_order(target[:, None], 4)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_asked_for_type_is_rounded_to_once(out_dtype):
    features, vectors, target = graph(60, 5, 4, dtype=torch.bfloat16)
    want = reference(features, target, 5, vectors, "mean")
    got = edge_to_node(
        features, target, 5, edge_vectors=vectors, reduce="mean", out_dtype=out_dtype
    )
    eps = torch.finfo(out_dtype).eps
    for result, exact in zip(got, want, strict=True):
        assert result.dtype == out_dtype
        torch.testing.assert_close(result, exact.to(out_dtype), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 130])
def test_gradients_of_each_type_and_width(dtype, channels):
    """First order, against the dense product in float64."""
    features, vectors, target = graph(70, 9, channels, dtype=dtype)
    onto = torch.nn.functional.one_hot(target, 9).double()
    generator = torch.Generator(DEVICE).manual_seed(5)
    grads = torch.randn(9, 4, channels, generator=generator, dtype=torch.float64).to(dtype)

    def first(f, u, sums):
        scalar, vector = sums(f, u)
        value = (scalar * grads[:, 0].to(f)).sum() + (vector * grads[:, 1:].to(f)).sum()
        return torch.autograd.grad(value, [f, u])

    def dense(f, u):
        return onto.t() @ f, torch.einsum("en,ek,ec->nkc", onto, u, f)

    exact = (features.double().requires_grad_(), vectors.double().requires_grad_())
    want = first(*exact, dense)
    got = first(
        features.requires_grad_(),
        vectors.requires_grad_(),
        lambda f, u: edge_to_node(f, target, 9, edge_vectors=u),
    )
    eps = torch.finfo(dtype).eps
    for result, expected in zip(got, want, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=4 * eps, atol=200 * eps)


def test_expanded_gradients_and_row_strides():
    """What autograd hands over need not be contiguous, and neither need slices of features."""
    wide, vectors, target = graph(30, 4, 12)
    features = wide[:, 3:9].requires_grad_()
    scalar, vector = edge_to_node(features, target, 4, edge_vectors=vectors)
    torch.testing.assert_close(scalar, edge_to_node(features.detach().clone(), target, 4))
    (grad,) = torch.autograd.grad(scalar.sum() + vector.sum(), features)
    torch.testing.assert_close(grad, (1 + vectors.sum(1, keepdim=True)).expand(-1, 6))


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
        "check": True,
    } | {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with pytest.raises(error, match=message):
        edge_to_node(given.pop("edge_features"), given.pop("target_index"), **given)
