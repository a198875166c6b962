"""Features captured from the small models, in float64.

`float64` holds for every test of a module that imports it.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn

from fairchem_kd.features import FeatureExtractor, Request, available_features

FLAVOURS = sorted(models.CONFIGS)


@pytest.fixture(autouse=True)
def float64():
    """fairchem's models and their inputs in float64, so that derivatives can be compared."""
    with models.default_dtype(torch.float64):
        yield


def small(flavour: str, **overrides: Any) -> nn.Module:
    return models.small_model(flavour, dtype=torch.float64, **overrides)


def batch(slabs: Any = None) -> Any:
    return models.batch(slabs, dtype=torch.float64)


def all_requests(model: nn.Module) -> list[Request]:
    """Every address in every form that it can have."""
    requests = []
    for address, spec in available_features(model).items():
        forms = ("node", "vector", "edge") if spec.kind == "edge" else (spec.kind,)
        requests += [Request(address, form) for form in forms]
    return requests


def extract(model: nn.Module, data: Any, requests: Any = None, detach: bool = False):
    """Features by request, and the outputs of the same forward."""
    requests = all_requests(model) if requests is None else [Request(*r) for r in requests]
    with FeatureExtractor(model, requests).capture(detach=detach) as captured:
        outputs = model(data)
    return {request: captured[request] for request in requests}, outputs
