"""Small stock fairchem models and small structures for everyone's tests.

Every model is built through fairchem's registry, with a fixed seed, in the dtype asked for, and
runs in milliseconds. Channel widths differ (atoms, edges), so that a mix-up shows as a shape.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ase
import numpy as np
import torch
from ase.build import add_adsorbate, fcc100, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from fairchem.core.models.gemnet_oc.layers import spherical_basis
from fairchem.core.modules.scaling import ScaleFactor
from torch import nn
from torch_geometric.data import Batch, Data

from fairchem_kd.features.architecture import draws_numbers

#: SymPy works it out again for each layer of each GemNet-OC.
spherical_basis.get_sph_harm_basis = functools.cache(spherical_basis.get_sph_harm_basis)

PAINN = {
    "name": "painn",
    "hidden_channels": 16,
    "num_layers": 3,
    "num_rbf": 8,
    "cutoff": 4.5,
    "max_neighbors": 60,
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
    "direct_forces": True,
}
SCHNET = {
    "name": "schnet",
    "hidden_channels": 20,
    "num_filters": 12,
    "num_interactions": 3,
    "num_gaussians": 10,
    "cutoff": 4.5,
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
}
GEMNET_OC = {
    "name": "gemnet_oc",
    "num_spherical": 3,
    "num_radial": 6,
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 20,
    "emb_size_trip_in": 4,
    "emb_size_trip_out": 4,
    "emb_size_quad_in": 4,
    "emb_size_quad_out": 4,
    "emb_size_aint_in": 4,
    "emb_size_aint_out": 4,
    "emb_size_rbf": 4,
    "emb_size_cbf": 4,
    "emb_size_sbf": 4,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_concat": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "num_atom_emb_layers": 1,
    "num_global_out_layers": 1,
    "cutoff": 4.5,
    "cutoff_qint": 3.5,
    "cutoff_aeaint": 4.5,
    "cutoff_aint": 5.0,
    # Never reached: a cut through equally distant neighbours would depend on the atoms' order.
    "max_neighbors": 200,
    "max_neighbors_qint": 200,
    "max_neighbors_aeaint": 200,
    "max_neighbors_aint": 200,
    "rbf": {"name": "gaussian"},
    "envelope": {"name": "polynomial", "exponent": 5},
    "cbf": {"name": "spherical_harmonics"},
    "sbf": {"name": "legendre_outer"},
    "extensive": True,
    "output_init": "HeOrthogonal",
    "activation": "silu",
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "qint_tags": [1, 2],
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
    "direct_forces": True,
}

PAINN_HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {"model": "painn_backbone", **{k: v for k, v in PAINN.items() if k != "name"}},
    "heads": {
        "energy": {"module": "painn_energy_head"},
        "forces": {"module": "painn_force_head"},
    },
}
GEMNET_OC_HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {
        "model": "gemnet_oc_backbone",
        **{k: v for k, v in GEMNET_OC.items() if k != "name"},
    },
    "heads": {
        "energy": {"module": "gemnet_oc_energy_and_grad_force_head", "num_global_out_layers": 1},
        "forces": {"module": "gemnet_oc_force_head", "num_global_out_layers": 1},
    },
}
EQUIFORMER_V2 = {
    "name": "equiformer_v2",
    "num_layers": 2,
    "sphere_channels": 8,
    "attn_hidden_channels": 8,
    "num_heads": 2,
    "attn_alpha_channels": 4,
    "attn_value_channels": 3,
    "ffn_hidden_channels": 10,
    "edge_channels": 6,
    "lmax_list": [2],
    "mmax_list": [2],
    "grid_resolution": 18,  # of a coarser grid, activations are not equivariant
    "num_sphere_samples": 8,
    "alpha_drop": 0.0,
    "drop_path_rate": 0.0,
    "max_radius": 4.5,
    "max_neighbors": 200,
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
}
ESCN = {
    "name": "escn",
    "num_layers": 2,
    "sphere_channels": 8,
    "hidden_channels": 7,
    "edge_channels": 6,
    "lmax_list": [2],
    "mmax_list": [2],
    "resolution": 18,
    "num_sphere_samples": 128,
    "distance_resolution": 0.2,
    "cutoff": 4.5,
    "max_neighbors": 200,
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
}
ESEN_BACKBONE = {
    "model": "esen_backbone",
    "num_layers": 2,
    "sphere_channels": 8,
    "hidden_channels": 7,
    "edge_channels": 6,
    "lmax": 2,
    "mmax": 2,
    "grid_resolution": 18,
    "num_distance_basis": 16,
    "cutoff": 4.5,
    "max_neighbors": 200,
    "use_pbc": True,
    "otf_graph": True,
    "regress_forces": True,
    "direct_forces": True,
}
EQUIFORMER_V2_HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {
        "model": "equiformer_v2_backbone",
        **{k: v for k, v in EQUIFORMER_V2.items() if k != "name"},
    },
    "heads": {
        "energy": {"module": "equiformerV2_scalar_head"},
        "forces": {"module": "equiformerV2_vector_head"},
    },
}
ESCN_HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": {"model": "escn_backbone", **{k: v for k, v in ESCN.items() if k != "name"}},
    "heads": {
        "energy": {"module": "escn_energy_head"},
        "forces": {"module": "escn_force_head"},
    },
}
ESEN_HYDRA = {
    "name": "hydra",
    "pass_through_head_outputs": True,
    "backbone": ESEN_BACKBONE,
    "heads": {
        "energy": {"module": "esen_mlp_energy_head"},
        "forces": {"module": "esen_linear_force_head"},
    },
}
ESEN_GRADIENT = {
    **ESEN_HYDRA,
    "backbone": {
        **ESEN_BACKBONE,
        "direct_forces": False,
        "distance_function": "bessel",
        "use_envelope": True,
        "act_type": "gate",
        "mlp_type": "spectral",
    },
    "heads": {"energy": {"module": "esen_mlp_efs_head"}},
}

#: Every flavour by name: the `model` block of a fairchem config.
CONFIGS: dict[str, dict[str, Any]] = {
    "painn": PAINN,
    "painn_gradient": {**PAINN, "direct_forces": False},
    "painn_energy": {**PAINN, "regress_forces": False},
    "painn_hydra": PAINN_HYDRA,
    "schnet": SCHNET,
    "schnet_energy": {**SCHNET, "regress_forces": False},
    "gemnet_oc": GEMNET_OC,
    "gemnet_oc_gradient": {**GEMNET_OC, "direct_forces": False},
    "gemnet_oc_energy": {**GEMNET_OC, "direct_forces": False, "regress_forces": False},
    "gemnet_oc_hydra": GEMNET_OC_HYDRA,
    "equiformer_v2": EQUIFORMER_V2,
    "equiformer_v2_hydra": EQUIFORMER_V2_HYDRA,
    "escn": ESCN,
    "escn_hydra": ESCN_HYDRA,
    "esen_hydra": ESEN_HYDRA,
    "esen_hydra_gradient": ESEN_GRADIENT,
}
#: Those whose states are irreps of SO(3).
SPHERICAL = tuple(name for name in CONFIGS if name.startswith(("equiformer", "escn", "esen")))


def model_config(flavour: str, **overrides: Any) -> dict[str, Any]:
    """A fresh copy of the `model` block named ``flavour`` (a key of `CONFIGS`)."""
    return {**copy.deepcopy(CONFIGS[flavour]), **overrides}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """fairchem's models create some tensors in torch's default dtype; hold it at ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(config: dict[str, Any], *, seed: int = 0, fitted: bool = True) -> nn.Module:
    """A model from its `model` block, through fairchem's registry; torch's generator is kept."""
    # GemNet-OC takes 0.4 s to build: build each once, and hand out copies
    dtype = torch.get_default_dtype()
    return copy.deepcopy(_build_once(json.dumps(config, sort_keys=True), seed, fitted, dtype))


@functools.cache
def _build_once(block: str, seed: int, fitted: bool, _dtype: torch.dtype) -> nn.Module:
    setup_imports()
    config = json.loads(block)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # fairchem's PaiNN calls a method that newer torch_geometric calls a no-op
        warnings.filterwarnings("ignore", "'PaiNNMessage.jittable' is deprecated")
        torch.manual_seed(seed)
        model = registry.get_model_class(config.pop("name"))(**config)
    if draws_numbers(model):
        model.register_forward_pre_hook(_draw_the_same)
    return fit_scales(model) if fitted else model


def _draw_the_same(*_: Any) -> None:
    """Edges get the same frames in every forward, so that two can be compared bit for bit."""
    torch.manual_seed(0)


def small_model(
    flavour: str,
    *,
    seed: int = 0,
    fitted: bool = True,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> nn.Module:
    """The small stock model named ``flavour`` (a key of `CONFIGS`).

    ``fitted`` sets the scale factors to 1 (see `fit_scales`); in float64 the forward has to run
    inside ``default_dtype(torch.float64)``, and GemNet-OC's last linear heads, to whose input
    fairchem applies ``.float()``, stay float32.
    """
    with default_dtype(dtype):
        model = build_model(model_config(flavour, **overrides), seed=seed, fitted=fitted)
    if dtype != torch.float32:
        model.to(dtype)
        if flavour.startswith("gemnet_oc"):
            for name, module in model.named_modules():
                if name.endswith(("out_energy", "out_forces", "output_heads.forces.out_mlp_F")):
                    module.float()
    return model


def fit_scales(model: nn.Module, value: float = 1.0) -> nn.Module:
    """Set every unfitted `ScaleFactor` to ``value``, so that the model counts as fitted."""
    for module in model.modules():
        if isinstance(module, ScaleFactor) and not module.fitted:
            module.scale_factor.data.fill_(value)
    return model


def structures(count: int = 3, *, seed: int = 0, std: float = 0.1) -> list[ase.Atoms]:
    """Up to 4 rattled slabs of 12 metal atoms with H, O or OH, an EMT calculator attached.

    Tags 0 (sub-surface), 1 (surface), 2 (adsorbate); the lowest layer is fixed. No two distances
    are equal but those between periodic images of one atom.
    """
    rng = np.random.default_rng(seed)
    recipes = [
        (fcc111, "Cu", 3.7, "O"),
        (fcc100, "Pt", 4.0, "OH"),
        (fcc111, "Pt", 4.0, "H"),
        (fcc100, "Cu", 3.7, "OH"),
    ]
    slabs = []
    for surface, metal, lattice, adsorbate in recipes[:count]:
        slab = surface(metal, (2, 2, 3), a=lattice, vacuum=5.0)
        slab.pbc = True
        layer = slab.get_tags()  # ase counts layers from the top
        molecule = ase.Atoms(
            adsorbate, positions=[(0.2, 0.1, 0.97 * i) for i in range(len(adsorbate))]
        )
        add_adsorbate(slab, molecule, height=1.4, position="bridge")
        tags = np.full(len(slab), 2)
        tags[: len(layer)] = layer == 1
        slab.set_tags(tags)
        slab.positions += rng.normal(0.0, std, slab.positions.shape)
        slab.set_constraint(FixAtoms(indices=np.flatnonzero(layer == layer.max())))
        slab.calc = EMT()
        slabs.append(slab)
    return slabs


def to_data(atoms: ase.Atoms, index: int = 0, *, dtype: torch.dtype = torch.float32) -> Data:
    """One labelled fairchem sample; ``pos``, ``energy`` (eV) and ``forces`` (eV/Å) in ``dtype``.

    The cell stays float32, because fairchem's neighbour search multiplies it with float32 tensors.
    """
    fixed = np.zeros(len(atoms))
    for constraint in atoms.constraints:
        fixed[constraint.index] = 1
    return Data(
        pos=torch.tensor(atoms.positions, dtype=dtype),
        cell=torch.tensor(np.array(atoms.cell), dtype=torch.float32).view(1, 3, 3),
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.float32),
        natoms=len(atoms),
        tags=torch.tensor(atoms.get_tags(), dtype=torch.long),
        fixed=torch.tensor(fixed, dtype=torch.float32),
        energy=torch.tensor(atoms.get_potential_energy(), dtype=dtype),
        forces=torch.tensor(atoms.get_forces(apply_constraint=False), dtype=dtype),
        sid=index,
        fid=0,
    )


def samples(number: int, seed: int = 0) -> list[Data]:
    """Up to 8 labelled samples, of two rattlings of each slab."""
    made = [*structures(4, seed=seed), *structures(4, seed=seed + 1)]
    return [to_data(atoms, index) for index, atoms in enumerate(made[:number])]


def slabs(number: int = 4, seed: int = 0) -> Batch:
    """`samples` as a plain batch, which no collater of fairchem has seen."""
    return Batch.from_data_list(samples(number, seed))


def batch(slabs: list[ase.Atoms] | None = None, *, dtype: torch.dtype = torch.float32) -> Data:
    """``slabs`` (default: `structures()`) as one fairchem batch with fresh tensors."""
    slabs = structures() if slabs is None else slabs
    samples = [to_data(atoms, index, dtype=dtype) for index, atoms in enumerate(slabs)]
    return data_list_collater(samples, otf_graph=True)
