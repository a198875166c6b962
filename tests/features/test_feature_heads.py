"""Features give the model's own outputs, through its heads."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from captures import FLAVOURS, batch, extract, small
from captures import float64 as float64

from fairchem_kd.features import available_features


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_atom_energies_sum_to_the_energy_and_node_gives_it_through_the_head(flavour: str) -> None:
    model, data = small(flavour), batch()
    features, outputs = extract(model, data, [("atom_energy", "node"), ("node", "node")])
    atoms = features["atom_energy", "node"].values.squeeze(1)
    head = model.output_heads["energy"] if "hydra" in flavour else model
    node = features["node", "node"].values
    if flavour.startswith("schnet"):
        again = head.lin2(head.act(head.lin1(node)))
    elif flavour.startswith("gemnet_oc"):
        again = head.out_energy(node.float())
    elif flavour.startswith("esen"):
        again = head.energy_block(node)
    elif flavour in models.SPHERICAL:
        again = atoms[:, None]  # their heads take in all degrees: see test_spherical.py
    else:
        again = head.out_energy(node)
    for values in (atoms, again.squeeze(1)):
        energy = values.new_zeros(len(data.natoms)).index_add(0, data.batch, values)
        torch.testing.assert_close(energy, outputs["energy"].view(-1))


@pytest.mark.parametrize("flavour", ["gemnet_oc", "gemnet_oc_hydra"])
def test_gemnet_oc_edges_and_vectors_give_the_forces(flavour: str) -> None:
    model, data = small(flavour), batch()
    features, outputs = extract(model, data, [("edge", "edge"), ("vector", "vector")])
    head = model.output_heads["forces"] if "hydra" in flavour else model
    edge = features["edge", "edge"]
    per_edge = head.out_forces(edge.values.float()) * edge.edge_vectors
    forces = torch.zeros_like(data.pos).index_add(0, edge.edge_index[1], per_edge)
    torch.testing.assert_close(forces, outputs["forces"])
    weight = head.out_forces.linear.weight.to(features["vector", "vector"].values.dtype)
    linear = (features["vector", "vector"].values @ weight.T).squeeze(-1)
    torch.testing.assert_close(linear, outputs["forces"], rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("flavour", ["painn", "painn_hydra"])
def test_painn_states_give_the_forces(flavour: str) -> None:
    model, data = small(flavour), batch()
    features, outputs = extract(model, data, [("node", "node"), ("vector", "vector")])
    head = model.output_heads["forces"] if "hydra" in flavour else model
    forces = head.out_forces(features["node", "node"].values, features["vector", "vector"].values)
    torch.testing.assert_close(forces, outputs["forces"])


@pytest.mark.parametrize("flavour", ["painn_gradient", "painn_energy"])
def test_default_vectors_of_painn_reach_an_output(flavour: str) -> None:
    """The last update's vectors do not, where forces are not made of them."""
    model = small(flavour)
    features, outputs = extract(model, batch(), [("vector", "vector"), ("vector@3", "vector")])
    vector, last = (feature.values for feature in features.values())
    used = torch.autograd.grad(
        outputs["energy"].sum(), [vector, last], allow_unused=True, retain_graph=True
    )
    assert used[0].abs().max() > 0
    assert used[1] is None
    assert "vector" not in available_features(small(flavour, num_layers=1))


def pairs_within(cutoff: float, pos: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Edges (2, E) sorted by target, without periodic images."""
    near = (pos[:, None] - pos[None]).norm(dim=-1) < cutoff
    near &= (batch[:, None] == batch[None]) & ~torch.eye(len(pos), dtype=torch.bool)
    return near.nonzero().T.flip(0)


@pytest.mark.parametrize("flavour", ["painn", "gemnet_oc"])
def test_without_periodic_boundaries(flavour: str) -> None:
    """With edges in the sample, since fairchem's own search needs torch_cluster here."""
    settings: dict[str, Any] = {"use_pbc": False, "otf_graph": False}
    if flavour == "gemnet_oc":  # larger ones make it search by itself
        settings |= {f"max_neighbors{s}": 50 for s in ("", "_qint", "_aeaint", "_aint")}
    model, data = small(flavour, **settings), batch()
    data.edge_index = pairs_within(5.0, data.pos, data.batch)
    features, outputs = extract(model, data)
    edge = features["edge", "edge"]
    assert edge.cell_offsets.abs().max() == 0
    span = data.pos[edge.edge_index[1]] - data.pos[edge.edge_index[0]]
    torch.testing.assert_close(edge.edge_vectors, span / span.norm(dim=1, keepdim=True))
    atoms = features["atom_energy", "node"].values.squeeze(1)
    energy = atoms.new_zeros(len(data.natoms)).index_add(0, data.batch, atoms)
    torch.testing.assert_close(energy, outputs["energy"])


def test_schnet_without_periodic_boundaries_goes_through_torch_geometric() -> None:
    model, data = small("schnet_energy", use_pbc=False, otf_graph=False), batch()

    def search(pos: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = pairs_within(4.5, pos, batch)
        return torch.stack([source, target]), (pos[source] - pos[target]).norm(dim=1)

    model.interaction_graph.forward = search
    data.edge_index = search(data.pos, data.batch)[0]
    features, outputs = extract(model, data)
    atoms = features["atom_energy", "node"].values.squeeze(1)
    energy = atoms.new_zeros(len(data.natoms)).index_add(0, data.batch, atoms)
    torch.testing.assert_close(energy, outputs["energy"].view(-1))
    again = model.lin2(model.act(model.lin1(features["node@3", "node"].values)))
    torch.testing.assert_close(again, features["atom_energy", "node"].values)
