"""Registered models that return features with their outputs.

``painn_kd``, ``schnet_kd``, ``gemnet_oc_kd``, ``equiformer_v2_kd`` and ``escn_kd`` are the stock
models with one more argument, ``features``: a list of feature addresses. Their forward then adds
``outputs["features"]``, a dictionary from address to `fairchem_kd.features.Feature`. Parameters,
state_dict, random numbers and outputs are those of the stock model. Distillation needs none of
this: it taps stock models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from fairchem.core.common.registry import registry
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from fairchem.core.models.escn.escn import eSCN
from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC
from fairchem.core.models.painn.painn import PaiNN
from fairchem.core.models.schnet import SchNetWrap
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features.address import Kind, Request, parse_address
from fairchem_kd.features.extractor import FeatureExtractor, available_features


def requests_by_kind(model: nn.Module, addresses: Iterable[str]) -> list[Request]:
    """Ask for every address in its own kind (edge features stay on their edges).

    Raises:
        UserError: for an address that ``model`` does not offer.
    """
    specs = available_features(model)
    requests = []
    for address in addresses:
        first = parse_address(address)[0]
        kind: Kind = specs[first].kind if first in specs else "node"
        requests.append(Request(address, kind))
    return list(FeatureExtractor(model, requests).specs)


def _as_addresses(features: Iterable[str] | str | None) -> list[str]:
    """``features`` as a list; the command line hands over one comma-separated string."""
    if features is None:
        return []
    if isinstance(features, str):
        features = features.strip("[] ").split(",")
        return [word.strip() for word in features if word.strip() not in ("", "null")]
    addresses = list(features)
    if not all(isinstance(address, str) for address in addresses):
        raise UserError(
            f"model.features has to be a list of feature addresses, not {addresses!r}; "
            "write for example [node, edge@2]"
        )
    return addresses


class _WithFeatures:
    """Mixin before a stock model class: the ``features`` argument, and the output of that name."""

    feature_requests: list[Request]

    def __init__(
        self, *args: Any, features: Iterable[str] | str | None = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self, nn.Module)
        self.feature_requests = requests_by_kind(self, _as_addresses(features))

    def forward(self, data: Any) -> dict[str, Any]:
        """The stock outputs, and ``features`` where any were requested."""
        if not self.feature_requests:
            return super().forward(data)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        # Made anew each time: an extractor kept on the model would tie its copies to the original.
        extractor = FeatureExtractor(self, self.feature_requests)
        with extractor.capture() as captured:
            outputs = super().forward(data)  # type: ignore[misc]
        features = {request.address: captured[request] for request in self.feature_requests}
        return {**outputs, "features": features}


@registry.register_model("gemnet_oc_kd")
class GemNetOCKD(_WithFeatures, GemNetOC):
    """GemNet-OC with the ``features`` argument."""


@registry.register_model("painn_kd")
class PaiNNKD(_WithFeatures, PaiNN):
    """PaiNN with the ``features`` argument."""


@registry.register_model("schnet_kd")
class SchNetKD(_WithFeatures, SchNetWrap):
    """SchNet with the ``features`` argument."""


@registry.register_model("equiformer_v2_kd")
class EquiformerV2KD(_WithFeatures, EquiformerV2):
    """EquiformerV2 with the ``features`` argument."""


@registry.register_model("escn_kd")
class ESCNKD(_WithFeatures, eSCN):
    """eSCN with the ``features`` argument."""


#: Registered name of each wrapper, and that of the stock model inside.
STOCK_NAMES = {
    "gemnet_oc_kd": "gemnet_oc",
    "painn_kd": "painn",
    "schnet_kd": "schnet",
    "equiformer_v2_kd": "equiformer_v2",
    "escn_kd": "escn",
}
_CLASSES = {
    "GemNetOCKD": "gemnet_oc",
    "PaiNNKD": "painn",
    "SchNetKD": "schnet",
    "EquiformerV2KD": "equiformer_v2",
    "ESCNKD": "escn",
}


def stock_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """The `model` block of the stock model inside a wrapper's (a deep copy; others unchanged).

    Understands the registered names and dotted paths that end in a wrapper's class name.
    """
    config = copy.deepcopy(config)
    name = str(config.get("name", ""))
    stock = STOCK_NAMES.get(name) or _CLASSES.get(name.rpartition(".")[2])
    if stock is not None:
        config["name"] = stock
        config.pop("features", None)
    return config
