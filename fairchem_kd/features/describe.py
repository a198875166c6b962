"""The features that a model offers, and how often each tap fires."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from torch import nn
from torch_geometric.data import Data

from fairchem_kd.features import wrappers  # noqa: F401  (registers the wrappers)
from fairchem_kd.features.architecture import Architecture, architecture_of
from fairchem_kd.features.facts import facts


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``model`` offers: every feature with kind, shape, channels and firings per forward.

    The model is run once, on a small structure. Switches ``use_pbc`` on, so that graphs can be
    made without torch_cluster: pass a model that is not needed afterwards.
    """
    architecture = architecture_of(model)
    firings = count_firings(architecture)
    backbone, known = architecture.backbone, facts(model)
    features = [
        {
            "address": address,
            "kind": spec.kind,
            "shape": spec.shape,
            "channels": spec.channels,
            "fires": firings[architecture.aliases.get(address, address)],
            "description": spec.description,
        }
        for address, spec in architecture.specs().items()
    ]
    return {
        "model": type(model).__name__,
        "backbone": type(backbone).__name__,
        "parameters": known["parameters"],
        "cutoff": known["cutoff"],
        "max_neighbors": known["neighbours"],
        "forces": known["forces"],
        "embedded_elements": architecture.num_elements,
        "features": features,
    }


def count_firings(architecture: Architecture) -> dict[str, int]:
    """How often each tap fires in one forward on a small structure."""
    counts = dict.fromkeys(architecture.taps, 0)

    def counter(address: str) -> Any:
        def count(_values: Any) -> None:
            counts[address] += 1

        return count

    root, backbone = architecture.root, architecture.backbone
    backbone.use_pbc = backbone.otf_graph = True
    training = root.training
    with ExitStack() as stack:
        for address, tap in architecture.taps.items():
            stack.callback(tap.attach(counter(address)).remove)
        root.eval()
        root(_water(next(root.parameters()).device))
    root.train(training)
    return counts


def _water(device: torch.device) -> Data:
    """Two water molecules and a hydrogen molecule in a periodic box, as a fairchem batch."""
    positions = [
        [1.0, 1.0, 1.0],
        [1.9, 1.1, 1.2],
        [0.7, 1.9, 1.1],
        [3.2, 2.8, 1.6],
        [3.9, 3.3, 2.1],
        [2.6, 3.3, 1.0],
        [1.5, 3.7, 3.6],
        [1.6, 3.1, 4.0],
    ]
    numbers = [8, 1, 1, 8, 1, 1, 1, 1]
    sample = Data(
        pos=torch.tensor(positions, dtype=torch.float32),
        cell=5.5 * torch.eye(3, dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(numbers, dtype=torch.float32),
        natoms=len(numbers),
        tags=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
        fixed=torch.zeros(len(numbers)),
        sid=0,
        fid=0,
    )
    return data_list_collater([sample], otf_graph=True).to(device)
