"""The gradients that flow through features, and those that must not."""

from __future__ import annotations

import models
import pytest
import torch
from captures import FLAVOURS, all_requests, batch, extract, small
from captures import float64 as float64


@pytest.mark.parametrize(
    "flavour",
    [
        *("painn_gradient", "schnet", "gemnet_oc_gradient", "painn"),
        *("equiformer_v2", "escn", "esen_hydra", "esen_hydra_gradient"),
    ],
)
def test_gradients_flow_through_student_features_and_forces(flavour: str) -> None:
    """Along a random direction of the weights: autograd against a central difference."""
    model = small(flavour)
    requests = all_requests(model)
    parameters = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float64]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]
    length = sum(d.pow(2).sum() for d in direction).sqrt()
    direction = [d / length for d in direction]

    def loss() -> torch.Tensor:
        features, outputs = extract(model, batch(models.structures(1)), requests)
        total = outputs["forces"].double().pow(2).mean()
        for feature in features.values():
            if feature.values.dtype == torch.float64:  # GemNet-OC's energies are float32
                total = total + feature.values.pow(2).mean()
        return total

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    analytic = sum(
        (g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None
    )
    step, values = 1e-3 if flavour.startswith("gemnet") else 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
        values.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * step * d
    numeric = (values[0] - values[1]) / (2 * step)
    assert analytic.item() == pytest.approx(numeric, rel=2e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_detached_features_have_no_graph(flavour: str) -> None:
    model, data = small(flavour), batch()
    kept, _ = extract(model, data)
    detached, _ = extract(model, batch(), detach=True)
    for request, feature in detached.items():
        for tensor in (feature.values, feature.edge_vectors):
            assert tensor is None or not tensor.requires_grad, request
        torch.testing.assert_close(feature.values, kept[request].values, rtol=0, atol=0)
    # vectors of zero layers or alike would not depend on a weight: none are offered
    assert all(feature.values.requires_grad for feature in kept.values())
