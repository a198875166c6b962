"""Capturing features: it leaves the model as it was, and keeps nothing for longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch
from captures import FLAVOURS, all_requests, batch, extract, small
from captures import float64 as float64
from torch import nn

from fairchem_kd.features import FeatureExtractor, Request


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outputs_with_a_capture_equal_those_without(flavour: str) -> None:
    model = models.small_model(flavour)
    with models.default_dtype(torch.float32):
        plain = model(models.batch())
        requests = all_requests(model)
        _, tapped = extract(model, models.batch(), requests)
        _, detached = extract(model, models.batch(), requests, detach=True)
    for outputs in (tapped, detached):
        assert outputs.keys() == plain.keys()
        assert all(torch.equal(outputs[key], plain[key]) for key in plain)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_model_is_untouched_outside_the_context(flavour: str) -> None:
    model, data = small(flavour), batch()

    def marks() -> list:
        return [
            (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ]

    model(data)  # stock keeps things of its last forward
    before = marks()
    extractor = FeatureExtractor(model, all_requests(model))
    assert marks() == before
    with extractor.capture():
        assert marks() != before
        model(data)
    assert marks() == before
    with pytest.raises(ZeroDivisionError), extractor.capture():
        _ = 1 / 0
    assert marks() == before


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_kept_once_the_result_is_dropped(flavour: str) -> None:
    model, data = small(flavour), batch()
    extractor = FeatureExtractor(model, all_requests(model))
    gc.collect()
    gc.disable()  # reference counts alone have to free them
    try:
        with torch.no_grad(), extractor.capture(detach=True) as captured:
            outputs = model(data)
        kept = [weakref.ref(captured[request]) for request in extractor.specs]
        kept += [weakref.ref(captured[request].values) for request in extractor.specs]
        del captured, outputs
        assert not any(reference() is not None for reference in kept)
    finally:
        gc.enable()


def test_aggregated_edges_are_not_kept() -> None:
    model, data = small("gemnet_oc"), batch()
    seen = []
    handle = model.out_mlp_F.register_forward_hook(lambda *args: seen.append(weakref.ref(args[-1])))
    extractor = FeatureExtractor(model, [Request("edge", "node"), Request("vector", "vector")])
    with torch.no_grad(), extractor.capture():
        model(data)
        assert seen[0]() is None
    handle.remove()


def test_one_pass_gives_both_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairchem_kd.features import extractor as module

    model, data, calls = small("gemnet_oc"), batch(), []
    real = module.edge_to_node

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "edge_to_node", counted)
    extract(model, data, [("edge", "node"), ("edge", "vector"), ("vector", "vector")])
    assert len(calls) == 1
    calls.clear()
    extract(model, data, [("edge", "node"), ("edge@1", "edge"), ("node", "node")])
    assert len(calls) == 1
    assert "edge_vectors" not in calls[0]


def test_a_request_that_never_fires_or_fires_twice_is_named() -> None:
    model, data = small("painn"), batch()
    extractor = FeatureExtractor(model, [Request("node@2", "node")])
    with pytest.raises(RuntimeError, match=r"'node@2' of PaiNN fired never"), extractor.capture():
        pass
    both = nn.Sequential(model, nn.Identity())
    both.forward = lambda x: (model(x), model(x))
    with pytest.raises(RuntimeError, match=r"'node@2' of PaiNN fired 2 times"), extractor.capture():
        both(data)
    with extractor.capture() as captured:
        model(data)
        with pytest.raises(RuntimeError, match="context is left"):
            captured[Request("node@2", "node")]
    assert captured[Request("node@2", "node")].values.shape == (len(data.pos), 16)
    with pytest.raises(KeyError):
        captured[Request("node@1", "node")]


def test_another_shape_than_promised_is_named() -> None:
    model, data = small("schnet_energy"), batch()
    extractor = FeatureExtractor(model, [Request("atom_energy", "node")])
    model.lin2 = nn.Linear(10, 2)
    extractor = FeatureExtractor(model, [Request("atom_energy", "node")])
    with (
        pytest.raises(RuntimeError, match=r"'atom_energy'.*\[40, 2\] where \[40, 1\].*\(N, 1\)"),
        extractor.capture(),
    ):
        model(data)


def test_two_extractors_at_once() -> None:
    model, data = small("gemnet_oc"), batch()
    outer = FeatureExtractor(model, [Request("edge", "node")])
    inner = FeatureExtractor(model, [Request("vector", "vector"), Request("edge", "node")])
    with outer.capture() as first, inner.capture(detach=True) as second:
        model(data)
    torch.testing.assert_close(first["edge", "node"].values, second["edge", "node"].values)
    assert "get_graphs_and_indices" not in vars(model)


def test_nothing_requested_works_on_any_model():
    model = torch.nn.Linear(2, 2)
    extractor = FeatureExtractor(model, [])
    with extractor.capture():
        model(torch.ones(1, 2))
    assert extractor.specs == {}


def test_what_is_around_the_taps_sees_each_of_them_once() -> None:
    """Of edges, with the sum over them; and no longer once it is taken away."""
    model, data = small("gemnet_oc"), batch()
    extractor = FeatureExtractor(model, [Request("node", "node"), Request("edge", "node")])
    inside: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    with extractor.capture() as expected:
        model(data.clone())
    extractor.around = around
    with extractor.capture() as captured:
        model(data.clone())
    assert inside == ["in", "out"] * 2
    for request in extractor.specs:
        assert torch.equal(captured[request].values, expected[request].values)
    extractor.around = None
    with extractor.capture():
        model(data.clone())
    assert len(inside) == 4
