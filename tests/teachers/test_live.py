"""A live teacher does no more than it has to, and says the same bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn
from trainings import config, trainer
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.machine import PRECISIONS
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import LiveTeacher

OUTPUTS = {"energy": {"level": "system"}, "forces": {"level": "atom"}}
#: By model, features of which the last one is there before the module runs that makes the energy.
BEFORE: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "painn": ([("node", "node"), ("vector", "vector"), ("edge@1", "vector")], "out_energy"),
    "schnet": ([("node@2", "node"), ("node@1", "node")], "lin2"),
    "gemnet_oc": ([("edge@1", "node"), ("node@1", "node"), ("vector@1", "vector")], "out_energy"),
    "gemnet_oc_gradient": ([("edge@2", "vector"), ("node@2", "node")], "out_energy"),
    "gemnet_oc_hydra": ([("edge@1", "node"), ("node@2", "node")], "out_energy"),
}


def live_teacher(flavour: str, precision: str = "fp32") -> LiveTeacher:
    return LiveTeacher(FrozenModel(models.small_model(flavour), Units({}, {}), OUTPUTS), precision)


def outermost(model: nn.Module, name: str) -> nn.Module:
    found = [(n.count("."), m) for n, m in model.named_modules() if n.rpartition(".")[2] == name]
    return min(found, key=lambda one: one[0])[1]


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """One entry for every forward of the module in the block."""
    counted: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        yield counted
    finally:
        handle.remove()


@pytest.mark.parametrize("flavour", BEFORE)
def test_features_without_outputs_are_the_same_bits_for_less(flavour: str) -> None:
    wanted, last = BEFORE[flavour]
    requests = [Request(*one) for one in wanted]
    live, batch = live_teacher(flavour), models.batch()
    model = live.frozen.model
    extractor = FeatureExtractor(model, requests)
    with torch.no_grad(), extractor.capture(detach=True) as plain:  # nothing of what is tested
        out = model(models.batch())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    with calls(outermost(model, last)) as ran:
        whole = live.teach(batch, requests)
        assert len(ran) == 1
        alone = [live.teach(batch, requests, outputs=False) for _ in range(2)]
        assert len(ran) == 1
        again = live.teach(batch, requests)
    for said in (whole, *alone, again):
        for request in requests:
            assert torch.equal(said.features[request], plain[request].values), request
            assert not said.features[request].is_inference()
    for said in (whole, again):
        assert torch.equal(said.outputs["energy"].flatten(), out["energy"].flatten().double())
        assert torch.equal(said.outputs["forces"], out["forces"].double())
    assert not any(said.outputs for said in alone)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert attributes == [sorted(vars(m)) for m in model.modules()]


@pytest.mark.parametrize("flavour", ["painn", "schnet", "gemnet_oc"])
def test_what_is_said_may_be_kept_by_autograd(flavour: str) -> None:
    live, request = live_teacher(flavour), Request("node", "node")
    with calls(live.frozen.model) as ran:
        said = live.teach(models.batch(), [request])
    assert len(ran) == 1
    values = [said.features[request], *said.outputs.values()]
    assert not any(value.is_inference() or value.requires_grad for value in values)
    for value in values:
        weight = torch.ones((), dtype=value.dtype, requires_grad=True)
        (weight * value).square().sum().backward()  # keeps the value for the backward
        assert weight.grad is not None


def test_inference_mode_is_for_forces_that_are_no_gradient() -> None:
    modes = {}
    for flavour in ("painn", "gemnet_oc", "schnet_energy", "schnet", "gemnet_oc_gradient"):
        live, seen = live_teacher(flavour), []
        embedding = live.extractor([Request("node", "node")])._architecture.atom_embedding
        with_hook = embedding.register_forward_hook(
            lambda *_, seen=seen: seen.append(torch.is_inference_mode_enabled())
        )
        live.teach(models.batch(), [])
        with_hook.remove()
        modes[flavour] = seen
    assert modes == {
        "painn": [True],
        "gemnet_oc": [True],
        "schnet_energy": [True],
        "schnet": [False],
        "gemnet_oc_gradient": [False],
    }


def test_nothing_is_kept_of_a_forward_that_was_left() -> None:
    """Reference counts alone free what the forward had made, forces by autograd included."""
    model, request = models.small_model("schnet"), Request("node@1", "node")
    extractor, seen = FeatureExtractor(model, [request]), []
    handle = model.interactions[0].register_forward_hook(
        lambda _m, _a, out: seen.append(weakref.ref(out))
    )
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with extractor.capture(detach=True, stop=True) as captured:
                model(models.batch())
            del captured
        assert len(seen) == 2
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()
        handle.remove()


def test_a_feature_that_fires_twice_is_found_before_forwards_are_left() -> None:
    model, data = models.small_model("painn"), models.batch()
    extractor = FeatureExtractor(model, [Request("node@1", "node")])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="fired 2 times"), extractor.capture(stop=True):
            _ = model(data), model(data)


def test_other_errors_inside_are_not_taken_for_the_end() -> None:
    model = models.small_model("painn")
    extractor = FeatureExtractor(model, [Request("node@1", "node")])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), extractor.capture(stop=True):
            _ = 1 / 0
    with pytest.raises(RuntimeError, match="fired never"), extractor.capture(stop=True):
        pass


def test_outputs_are_asked_for_where_they_count(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features alone without a loss on outputs; but the copies' largest forces are looked at."""
    teach = LiveTeacher.teach
    said: list[bool] = []

    def noting(self: LiveTeacher, *args: Any, outputs: bool = True) -> Any:
        said.append(outputs)
        return teach(self, *args, outputs=outputs)

    monkeypatch.setattr(LiveTeacher, "teach", noting)
    own = {"checkpoint": str(teacher), "store": "off"}
    for more, steps in (
        ({"losses": {"n2n": {}}}, False),
        ({"losses": {"n2n": {}}, "rattle": {"copies": 0.5}}, True),
        ({"losses": {"n2n": {}, "vanilla": {}}}, True),
    ):
        said.clear()
        given = config(tmp_path, data, distillation={"teacher": own, **more})
        with trainer(given) as built:
            built.train(disable_eval_tqdm=True)
        assert said[-4:] == [steps] * 4
        assert False in said  # by the statistics


def test_precision_is_part_of_what_a_teacher_is() -> None:
    teachers = [live_teacher("painn", precision) for precision in PRECISIONS]
    assert len({live.digest for live in teachers}) == 3
    assert len({live.identity for live in teachers}) == 3


@pytest.mark.parametrize("flavour", ["painn", "schnet", "gemnet_oc", "gemnet_oc_gradient"])
def test_bf16_is_near_and_handed_over_in_fp32(flavour: str) -> None:
    requests = [Request("node", "node")]
    if flavour == "gemnet_oc":
        requests += [Request("edge", "node"), Request("vector", "vector")]
    exact = live_teacher(flavour).teach(models.batch(), requests)
    half = live_teacher(flavour, "bf16").teach(models.batch(), requests)
    for request in requests:
        assert half.features[request].dtype == torch.float32
        near(half.features[request], exact.features[request])
    for name, values in half.outputs.items():
        assert values.dtype == torch.float64
        near(values, exact.outputs[name])


def near(half: torch.Tensor, exact: torch.Tensor) -> None:
    """Within what 8 bits of mantissa leave, and not the same."""
    error = (half - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_flags_are_the_teachers_in_its_forward_alone(precision: str, before: bool) -> None:
    live = live_teacher("painn", precision)
    matmul, seen = torch.backends.cuda.matmul, []

    def look(*_: Any) -> None:
        seen.append((matmul.allow_tf32, torch.is_autocast_enabled("cpu")))

    hook = live.frozen.model.out_energy.register_forward_hook(look)
    process = matmul.allow_tf32
    try:
        matmul.allow_tf32 = before
        with torch.autocast("cpu", torch.bfloat16, enabled=before):
            live.teach(models.batch(), [])
            assert torch.is_autocast_enabled("cpu") is before
        if precision != "bf16":  # which leaves matrix products in fp32 as the process has them
            assert seen == [(precision == "tf32", False)]
        else:
            assert seen[0][1]
        assert matmul.allow_tf32 is before
        hook.remove()
        hook = live.frozen.model.out_energy.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.teach(models.batch(), [])
        assert matmul.allow_tf32 is before
    finally:
        matmul.allow_tf32 = process
        hook.remove()
