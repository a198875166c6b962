"""Unbiased linear CKA in one pass: against dense references, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fairchem_kd.analysis.cka.similarity import Estimate, Form, Similarity


def cka(form: Form, x: Tensor, y: Tensor, batch: int | None = None, **options: Any) -> Estimate:
    """The value for features of one sample, taken in batches of so many atoms."""
    similarity = Similarity(form, [("x", "y")], **options)
    batch = batch or len(x)
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        similarity.update({"x": x[part], "y": y[part]}, start / len(x))
    return similarity.cka("x", "y")


def dense_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Song et al. (2012), equation 5, with N x N matrices."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    rows = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((k @ l).trace() + rows - 2 * (one @ k @ l @ one) / (n - 2)) / (n * (n - 3))


def dense_vector_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Over all pairs of different atoms, with 3N x 3N matrices."""
    n = len(x)
    k, l = (v.reshape(3 * n, -1) @ v.reshape(3 * n, -1).T for v in (x, y))  # noqa: E741
    other = 1 - torch.kron(torch.eye(n), torch.ones(3, 3)).to(k)
    return (k * l * other).sum() / (n * (n - 1))


def dense_cka(form: Form, x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    if form == "vector":
        both, *own = (dense_vector_hsic(*pair) for pair in ((x, y), (x, x), (y, y)))
    else:
        both, *own = (dense_hsic(a @ a.T, b @ b.T) for a, b in ((x, y), (x, x), (y, y)))
    return float(both / (own[0] * own[1]).sqrt())


def sample(form: Form, atoms: int, channels: int, seed: int) -> Tensor:
    shape = (atoms, channels) if form == "node" else (atoms, 3, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotations(atoms: int, seed: int = 0) -> Tensor:
    """A rotation for each of so many atoms, ``(N, 3, 3)``."""
    return torch.linalg.qr(sample("vector", atoms, 3, seed).double())[0]


FORMS: Sequence[Form] = ("node", "vector")


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_a_dense_reference(form: Form) -> None:
    """Of related features, in fp32 as models give them."""
    x = sample(form, 90, 7, 0) * torch.linspace(0.1, 3, 7)
    y = x @ sample("node", 7, 5, 1) + 3 * sample(form, 90, 5, 2)
    expected = dense_cka(form, x, y)
    assert 0.1 < expected < 0.9
    for batch in (90, 32, 1):
        assert cka(form, x, y, batch).value == pytest.approx(expected, abs=1e-10)


def test_features_far_from_the_origin_lose_no_digits() -> None:
    """The dense matrices do, so they are asked about centred features, which are as similar."""
    x = sample("node", 90, 7, 0).double()
    y = x @ sample("node", 7, 5, 1).double() + sample("node", 90, 5, 2)
    expected = dense_cka("node", x, y)
    for batch in (90, 32, 1):
        found = cka("node", x + 1000.0, y - 300.0 * torch.linspace(0, 1, 5), batch)
        assert found.value == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_cut_into_batches_does_not_matter(form: Form) -> None:
    x, y = sample(form, 101, 6, 0), sample(form, 101, 9, 1)
    y[..., :3] += x[..., :3]
    whole = cka(form, x, y).value
    for batch in (1, 10, 64):
        assert cka(form, x, y, batch).value == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_independent_features_give_nothing(form: Form) -> None:
    """On average 0, where the plain estimator gives 0.2, and as far off as the error says."""
    found = [
        cka(form, sample(form, 32, 8, 2 * seed), sample(form, 32, 8, 2 * seed + 1), 4)
        for seed in range(100)
    ]
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    errors = np.array([estimate.error for estimate in found], dtype=float)
    assert 0.6 < np.sqrt(np.mean(errors**2)) / values.std() < 1.7
    covered = np.mean([abs(e.value) <= (e.half_width or 0) for e in found])
    assert covered > 0.85
    assert (values < 0).any()  # an unbiased estimate of 0 is not always positive


@pytest.mark.parametrize("form", FORMS)
def test_the_same_up_to_rotation_and_scale_is_one(form: Form) -> None:
    x = sample(form, 40, 6, 0).double()
    turn = torch.linalg.qr(sample("node", 6, 6, 1).double())[0]
    others = [x, -x, 7.0 * x, 1e-4 * x @ turn]
    if form == "node":
        others.append(x @ turn + 3.0)
    for other in others:
        found = cka(form, x, other, 16)
        assert found.value == pytest.approx(1.0, abs=1e-12)
        assert found.error == pytest.approx(0.0, abs=1e-9)
    squeezed = x * torch.linspace(0.01, 1, 6)  # not a rotation of channels
    assert cka(form, x, squeezed).value < 0.95


def test_turning_structures_changes_nothing_about_vectors() -> None:
    x = sample("vector", 50, 6, 0).double()
    y = x @ sample("node", 6, 4, 1).double() + sample("vector", 50, 4, 2).double()
    x, y = x + torch.tensor([0.0, 0.0, 2.0])[:, None], y + torch.tensor([0.0, 0.0, 1.0])[:, None]
    turn = rotations(50)
    expected = cka("vector", x, y).value
    assert cka("vector", turn @ x, turn @ y).value == pytest.approx(expected, abs=1e-12)
    assert abs(cka("vector", turn @ x, rotations(50, 3) @ y).value) < abs(expected) / 2


def test_undefined_values_and_errors() -> None:
    x, y = sample("node", 12, 4, 0), sample("node", 12, 4, 1)
    assert np.isnan(cka("node", x, torch.full((12, 3), 2.5)).value)  # a dead layer
    assert np.isnan(cka("node", x[:3], y[:3]).value)
    assert np.isnan(cka("vector", *(sample("vector", 1, 4, seed) for seed in (0, 1))).value)
    assert cka("node", x, y).error is None  # one batch, one part
    assert cka("node", x, y, 1, groups=1).error is None
    assert cka("node", x, y, 1).error is not None


def test_many_pairs_at_once_and_their_differences() -> None:
    a = sample("node", 60, 5, 0)
    b, c = a + 0.5 * sample("node", 60, 5, 1), a + 2.0 * sample("node", 60, 5, 2)
    similarity = Similarity("node", [("a", "b"), ("a", "c")])
    for start in range(0, 60, 6):
        part = slice(start, start + 6)
        similarity.update({"a": a[part], "b": b[part], "c": c[part]}, start / 60)
    closer, farther = similarity.cka("a", "b"), similarity.cka("a", "c")
    assert closer.value == pytest.approx(dense_cka("node", a, b), abs=1e-10)
    assert farther.value == pytest.approx(dense_cka("node", a, c), abs=1e-10)
    assert len(closer.without) == 8
    kept = dense_cka("node", a[12:], b[12:])  # without the first two batches
    assert closer.without[0] == pytest.approx(kept, abs=1e-10)
    gained = closer - farther
    assert gained.value == closer.value - farther.value
    np.testing.assert_allclose(gained.without, closer.without - farther.without)
    assert gained.half_width is not None
    assert gained.value > gained.half_width


def test_memory_limits_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairchem_kd.analysis.cka.similarity.MEMORY", 3 * 8 * 3 * 25)
    x, y = sample("node", 40, 5, 0), sample("node", 40, 5, 1)
    assert len(cka("node", x, y, 2).without) == 3
