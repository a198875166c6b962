"""The registered wrappers: the stock models, with features in their output."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from fairchem.core.common.registry import registry
from torch.nn.parallel import DistributedDataParallel
from trainings import start_ranks

from fairchem_kd.errors import UserError
from fairchem_kd.features import (
    STOCK_NAMES,
    Feature,
    FeatureExtractor,
    Request,
    available_features,
    stock_model_config,
)

FLAVOURS = [name for name in models.CONFIGS if "hydra" not in name]


def wrapper_config(flavour: str, features: Any = ()) -> dict[str, Any]:
    config = models.model_config(flavour)
    return {**config, "name": f"{config['name']}_kd", "features": features}


def train_step(model: torch.nn.Module, features: bool = False) -> dict[str, Any]:
    """Outputs of one forward, with the gradients of their sum of squares on the parameters."""
    outputs = model(models.batch())
    loss = sum(outputs[key].pow(2).sum() for key in ("energy", "forces") if key in outputs)
    if features:
        loss = loss + sum(f.values.pow(2).sum() for f in outputs["features"].values())
    loss.backward()
    return outputs


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("with_features", [False, True])
def test_equal_to_the_stock_model_bit_for_bit(flavour: str, with_features: bool) -> None:
    stock = models.build_model(models.model_config(flavour), fitted=False)
    addresses = list(available_features(stock)) if with_features else []
    wrapped = models.build_model(wrapper_config(flavour, addresses), fitted=False)
    state, wrapped_state = stock.state_dict(), wrapped.state_dict()
    assert list(state) == list(wrapped_state)
    assert all(torch.equal(state[key], wrapped_state[key]) for key in state)
    models.fit_scales(stock)
    models.fit_scales(wrapped)

    expected, outputs = train_step(stock), train_step(wrapped)
    features = outputs.pop("features", {})
    assert list(features) == addresses
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    for (name, p), q in zip(stock.named_parameters(), wrapped.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("flavour", ["painn", "schnet", "gemnet_oc"])
def test_construction_draws_the_same_random_numbers(flavour: str) -> None:
    after = []
    for config in (models.model_config(flavour), wrapper_config(flavour, ["node"])):
        name = config.pop("name")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'PaiNNMessage.jittable' is deprecated")
                registry.get_model_class(name)(**config)
            after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("flavour", ["painn", "schnet", "gemnet_oc"])
def test_features_are_those_of_the_extractor(flavour: str) -> None:
    stock = models.small_model(flavour)
    addresses = [*available_features(stock), "node@0+1"]
    if flavour != "schnet":
        addresses.append("edge@2+1")
    wrapped = models.build_model(wrapper_config(flavour, addresses))
    features = wrapped(models.batch())["features"]
    requests = [Request(address, features[address].spec.kind) for address in addresses]
    with FeatureExtractor(stock, requests).capture() as captured:
        stock(models.batch())
    for request in requests:
        feature = features[request.address]
        assert isinstance(feature, Feature)
        assert feature.spec == captured[request].spec
        assert torch.equal(feature.values, captured[request].values)
        assert (feature.edge_index is None) == (feature.spec.kind != "edge")


def test_copies_and_pickles_have_features_of_their_own() -> None:
    model = models.build_model(wrapper_config("painn", ["node@1"]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.atom_emb.embeddings.weight.zero_()
        values = [m(models.batch())["features"]["node@1"].values for m in (model, twin)]
        assert not torch.allclose(*values)


def test_features_can_come_from_the_command_line() -> None:
    for given in ("node,edge@2", "[node, edge@2]", ("node", "edge@2")):
        model = models.build_model({**wrapper_config("painn"), "features": given})
        assert model.feature_requests == [Request("node", "node"), Request("edge@2", "edge")]
    for given in (None, "", "null", []):
        model = models.build_model({**wrapper_config("painn"), "features": given})
        assert model.feature_requests == []
        assert "features" not in model(models.batch())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["nod"], r"PaiNN.* has no feature 'nod' \(did you mean 'node'\?\)"),
        (["node@7"], r"'node' has the layers node@0\.\.3"),
        ([3], r"model\.features has to be a list of feature addresses, not \[3\]"),
    ],
)
def test_unknown_features_are_refused_when_the_model_is_built(features: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build_model(wrapper_config("painn", features))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_stock_model_config(flavour: str) -> None:
    stock = models.model_config(flavour)
    wrapped = wrapper_config(flavour, ["node"])
    before = copy.deepcopy(wrapped)
    assert stock_model_config(wrapped) == stock
    assert wrapped == before
    assert stock_model_config(stock) == stock
    kind = {
        "painn": "PaiNNKD",
        "schnet": "SchNetKD",
        "gemnet_oc": "GemNetOCKD",
        "equiformer_v2": "EquiformerV2KD",
        "escn": "ESCNKD",
    }[stock["name"]]
    dotted = {**wrapped, "name": f"fairchem_kd.features.wrappers.{kind}"}
    assert stock_model_config(dotted) == stock
    assert STOCK_NAMES[before["name"]] == stock["name"]
    models.build_model(dotted)  # fairchem imports dotted names by itself


@pytest.fixture
def single_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# A hint of torch's about speed, for a weight matrix of one row
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_inside_distributed_data_parallel(flavour: str, find_unused: bool) -> None:
    addresses = list(available_features(models.small_model(flavour)))
    bare = models.build_model(wrapper_config(flavour, addresses))
    inner = models.build_model(wrapper_config(flavour, addresses))
    wrapped = DistributedDataParallel(inner, find_unused_parameters=find_unused)
    expected = train_step(bare, features=True)
    outputs = train_step(wrapped, features=True)
    for address in addresses:
        value, other = outputs["features"][address].values, expected["features"][address].values
        torch.testing.assert_close(value, other)
    for (name, p), q in zip(bare.named_parameters(), inner.named_parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, msg=lambda m, n=name: f"{n}: {m}")


def average(rank: int, _world: int, _root: Path) -> None:
    """One of two ranks, each with a structure of its own: gradients are those of both alone."""
    requests = [Request("node", "node"), Request("edge@2", "vector")]

    def loss(model: torch.nn.Module, slab: Any) -> torch.Tensor:
        extractor = FeatureExtractor(model, requests)
        with extractor.capture() as captured:
            outputs = model(models.batch([slab]))
        total = outputs["forces"].pow(2).sum() + outputs["energy"].sum()
        return total + sum(captured[request].values.pow(2).sum() for request in requests)

    for flavour in ("painn", "gemnet_oc_gradient"):
        slabs = models.structures(2)
        model = models.small_model(flavour)
        wrapped = DistributedDataParallel(model)  # averages for as long as it lives
        loss(wrapped, slabs[rank]).backward()
        alone = models.small_model(flavour)
        (sum(loss(alone, slab) for slab in slabs) / 2).backward()
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_average_the_gradients_of_feature_losses(tmp_path: Path) -> None:
    start_ranks(average, 2, tmp_path)
