"""edge_to_node's types of numbers: what is summed, rounded and returned in which."""

from __future__ import annotations

import pytest
import torch
from edge_sums import DEVICE, graph, reference
from edge_sums import way as way

from fairchem_kd.ops import cpu, edge_to_node


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
