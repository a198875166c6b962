"""Features of stock fairchem models: what each architecture offers, and how it is tapped."""

from __future__ import annotations

from fairchem_kd.features import (  # noqa: F401  (they register themselves)
    equiformer_v2,
    escn,
    esen,
    gemnet_oc,
    painn,
    schnet,
)
from fairchem_kd.features.address import (
    GRAPH,
    Feature,
    FeatureSpec,
    Kind,
    Request,
    atom_energy,
    output_of,
)
from fairchem_kd.features.architecture import (
    MEAN_READOUT,
    Architecture,
    Emit,
    Graph,
    Handle,
    Tap,
    architecture_of,
    common_energy,
    energy_name_of,
    on_input,
    on_output,
    register_architecture,
    unwrap,
    wrap_method,
)
from fairchem_kd.features.extractor import Captured, FeatureExtractor, available_features
from fairchem_kd.features.wrappers import STOCK_NAMES, stock_model_config

__all__ = [
    "GRAPH",
    "MEAN_READOUT",
    "STOCK_NAMES",
    "Architecture",
    "Captured",
    "Emit",
    "Feature",
    "FeatureExtractor",
    "FeatureSpec",
    "Graph",
    "Handle",
    "Kind",
    "Request",
    "Tap",
    "architecture_of",
    "atom_energy",
    "available_features",
    "common_energy",
    "energy_name_of",
    "on_input",
    "on_output",
    "output_of",
    "register_architecture",
    "stock_model_config",
    "unwrap",
    "wrap_method",
]
