"""What is true of a model whatever its features: size, reach, and how it makes its forces."""

from __future__ import annotations

from typing import Any

from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrap
from fairchem.core.models.schnet import SchNetWrap
from torch import nn

from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.stock.gradient_forces import has_gradient_forces

_WITHOUT_FORCE_HEAD = (SchNetWrap, DimeNetPlusPlusWrap)


def facts(model: nn.Module) -> dict[str, Any]:
    """Parameters, cutoff, neighbours and forces of a model, as far as it has them."""
    backbone = backbone_of(model)
    # EquiformerV2 and eSCN have a head for forces and no such switch
    direct = getattr(backbone, "direct_forces", not isinstance(backbone, _WITHOUT_FORCE_HEAD))
    forces = "none"
    if has_gradient_forces(backbone):
        forces = "gradient"
    elif getattr(backbone, "regress_forces", True):
        forces = "direct" if direct else "gradient"
    return {
        "model": type(backbone).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cutoff": getattr(backbone, "cutoff", None),
        "neighbours": getattr(backbone, "max_neighbors", None),
        "use_pbc": getattr(backbone, "use_pbc", None),
        "forces": forces,
    }
