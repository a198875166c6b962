"""The derivatives of edge_to_node, of first to third order."""

from __future__ import annotations

import pytest
import torch
from edge_sums import DEVICE, INTERPRETED, graph
from edge_sums import way as way

from fairchem_kd.ops import edge_to_node


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
