"""Features that a model does not offer, and what is said of them."""

from __future__ import annotations

import models
import pytest
from captures import float64 as float64
from captures import small
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request, available_features


@pytest.mark.parametrize(
    ("flavour", "address", "form", "message"),
    [
        ("painn", "vectr", "vector", r"PaiNN has no feature 'vectr' \(did you mean 'vector'\?\)"),
        ("painn", "node@4", "node", r"'node' has the layers node@0\.\.3; it offers: node, vector"),
        ("painn", "node@1+9", "node", r"no feature 'node@9' \(in 'node@1\+9'\)"),
        ("painn", "vector@0", "vector", r"'vector' has the layers vector@1\.\.3"),
        ("painn", "message_node", "node", r"name a layer, message_node@1\.\.3"),
        ("painn", "atom_energy@1", "node", "'atom_energy' has no layers"),
        ("painn", "node@", "node", r"'node@' does not read <feature>\[@<layer>"),
        ("painn", "node@1+1", "node", "names a layer twice"),
        ("painn", "node", "vector", r"is a node feature .* vector features here: vector, vector@1"),
        ("painn", "vector", "edge", "'vector' of PaiNN is a vector feature"),
        ("painn", "edge", "edges", "form 'edges'"),
        ("schnet", "vector", "vector", "SchNet has no vectors; it offers: node, node@0"),
        ("schnet", "edge@1", "node", "SchNet has no edge features"),
        ("schnet", "node", "edge", "'node' of SchNetWrap is a node feature"),
        ("gemnet_oc_gradient", "edge", "node", r"no trained head .* edge@0 to edge@2"),
        ("gemnet_oc_gradient", "vector", "vector", r"name a layer, vector@0 to vector@2"),
        ("gemnet_oc_energy", "out_edge@1", "edge", "no trained head for direct forces"),
        ("gemnet_oc", "edge@3", "node", r"'edge' has the layers edge@0\.\.2"),
        ("gemnet_oc", "vector@1", "node", "is a vector feature"),
    ],
)
def test_what_is_not_offered_is_said(flavour: str, address: str, form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureExtractor(small(flavour), [Request(address, form)])


def test_direct_force_modules_without_forces_are_not_offered() -> None:
    """They exist in the stock model, but no loss has ever trained them."""
    model = small("gemnet_oc", regress_forces=False)
    assert hasattr(model, "out_mlp_F")
    offered = available_features(model)
    assert "edge@1" in offered
    assert not {"edge", "vector", "out_edge@1"} & set(offered)


def test_unsupported_architectures_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"features of Linear .* GemNetOC, PaiNN, SchNetWrap"):
        available_features(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("flavour", "override"), [("gemnet_oc", {"extensive": False}), ("schnet", {"readout": "mean"})]
)
def test_a_model_that_averages_over_atoms_has_no_atom_energies(flavour, override):
    model = models.small_model(flavour, **override)
    with pytest.raises(UserError, match="averages over atoms"):
        FeatureExtractor(model, [Request("atom_energy", "node")])
