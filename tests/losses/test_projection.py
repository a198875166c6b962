"""Projections: shapes, formulas, equivariance, and their own random numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fairchem_kd.errors import UserError
from fairchem_kd.losses.projection import PROJECTIONS, projection


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, kind, student=5, teacher=7, seed=0):
    return projection(name, kind, student, teacher, generator(seed)).double()


def orthogonal(reflect):
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator(4)))
    return matrix if (torch.linalg.det(matrix) < 0) == reflect else -matrix


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("kind", ["node", "vector"])
def test_shapes_and_gradients(name, kind):
    student = 7 if name == "identity" else 5
    module = make(name, kind, student)
    shape = (4, 3) if kind == "vector" else (4,)
    values = torch.randn(*shape, student, dtype=torch.float64, generator=generator(1))
    result = module(values.requires_grad_())
    assert result.shape == (*shape, 7)
    result.square().sum().backward()
    assert values.grad.abs().min() > 0
    for parameter in module.parameters():
        assert parameter.grad.abs().sum() > 0
    empty = module(values[:0])
    assert empty.shape == (0, *shape[1:], 7)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("reflect", [False, True])
def test_vectors_are_equivariant(name, reflect):
    module = make(name, "vector", 7)
    turn = orthogonal(reflect)
    vectors = torch.randn(6, 3, 7, dtype=torch.float64, generator=generator(1))
    turned = module(torch.einsum("ij,njc->nic", turn, vectors))
    torch.testing.assert_close(turned, torch.einsum("ij,njc->nic", turn, module(vectors)))
    assert not module(torch.zeros(2, 3, 7, dtype=torch.float64)).any()


def test_linear_by_hand():
    module = make("linear", "node", 2, 3)
    values = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    want = [sum(w * x for w, x in zip(row, [1.5, -2.0], strict=True)) for row in module.weight]
    torch.testing.assert_close(module(values)[0], torch.stack(want) + module.bias)
    assert module.bias.abs().min() > 0
    vectors = make("linear", "vector", 2, 3)
    assert vectors.bias is None
    torch.testing.assert_close(vectors(values.expand(3, 2)), values.expand(3, 2) @ vectors.weight.T)


def test_mlps_by_hand():
    scalars = torch.randn(4, 5, dtype=torch.float64, generator=generator(1))
    mlp = make("mlp", "node")
    hidden = scalars @ mlp.first.weight.T + mlp.first.bias
    hidden = hidden / (1 + (-hidden).exp())
    torch.testing.assert_close(mlp(scalars), hidden @ mlp.last.weight.T + mlp.last.bias)

    vectors = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator(1))
    mlp = make("mlp", "vector")
    hidden = vectors @ mlp.first.weight.T
    norms = (hidden**2).sum(1).sqrt()
    gate = 1 / (1 + (-(norms @ mlp.gate.weight.T + mlp.gate.bias)).exp())
    torch.testing.assert_close(mlp(vectors), (hidden * gate[:, None]) @ mlp.last.weight.T)


def test_vector_mlp_has_finite_derivatives_at_zero():
    vectors = torch.zeros(2, 3, 5, dtype=torch.float64, requires_grad=True)
    out = make("mlp", "vector")(vectors)
    (first,) = torch.autograd.grad(out.sum(), vectors, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), vectors)
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["node", "vector"])
def test_random_numbers_come_from_the_generator_alone(name, kind):
    torch.manual_seed(11)
    state, numpy, python = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    first = make(name, kind, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy).all()  # noqa: NPY002
    assert random.getstate() == python
    torch.manual_seed(12)
    again, other = make(name, kind, seed=5), make(name, kind, seed=6)
    for a, b, c in zip(*(m.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    shared = generator(5)
    one, two = (projection(name, kind, 5, 7, shared) for _ in range(2))
    assert not torch.equal(next(one.parameters()), next(two.parameters()))


def test_initial_values_are_spread_as_those_of_torch():
    weight = make("linear", "node", 256, 64).weight
    assert weight.abs().max() <= 1 / 16
    assert abs(float(weight.std().detach()) - 1 / 16 / 3**0.5) < 1e-3


def test_identity():
    values = torch.randn(3, 7)
    module = projection("identity", "node", 7, 7, generator())
    assert module(values) is values
    with pytest.raises(UserError, match=r"not 5 \(student\) and 7 \(teacher\): use linear"):
        projection("identity", "vector", 5, 7, generator())


def test_unknown_projection():
    with pytest.raises(UserError, match="cannot be 'linar'; known: linear, mlp, identity"):
        projection("linar", "node", 5, 7, generator())
