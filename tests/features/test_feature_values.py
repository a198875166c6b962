"""The values of every feature of every architecture, against independent recomputations."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from captures import FLAVOURS, all_requests, batch, extract, small
from captures import float64 as float64
from torch import nn

from fairchem_kd.features import FeatureExtractor, Request

WITH_EDGES = [name for name in FLAVOURS if not name.startswith("schnet")]


def expected_painn(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    """PaiNN's states by a plain loop over its layers."""
    edge_index, _, distance, vector, _ = model.generate_graph_values(data)
    basis = model.radial_basis(distance)
    x = model.atom_emb(data.atomic_numbers.long())
    vec = torch.zeros(len(x), 3, x.shape[1])
    states = {"node@0": x}
    source, target = edge_index
    for k, (message, update) in enumerate(
        zip(model.message_layers, model.update_layers, strict=True), start=1
    ):
        dx, dvec = message(x, vec, edge_index, basis, vector)
        x, vec = (x + dx) / 2**0.5, vec + dvec
        states |= {f"message_node@{k}": x, f"message_vector@{k}": vec}
        dx, dvec = update(x, vec)
        x, vec = x + dx, vec + dvec
        states |= {f"node@{k}": x, f"vector@{k}": vec}
        states[f"edge@{k}"] = torch.einsum("exc,exc->ec", vec[source], vec[target])
    states["node"] = x
    return states


def expected_schnet(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    graph = model.generate_graph(data)
    basis = model.distance_expansion(graph.edge_distance)
    h = model.embedding(data.atomic_numbers.long())
    states = {"node@0": h}
    for k, interaction in enumerate(model.interactions, start=1):
        h = h + interaction(h, graph.edge_index, graph.edge_distance, basis)
        states[f"node@{k}"] = h
    states["node"] = h
    states["atom_energy"] = model.lin2(model.act(model.lin1(h)))
    return states


def expected_gemnet_oc(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    names = "main a2a a2ee2a qint id_swap trip_idx_e2e trip_idx_a2e trip_idx_e2a quad_idx"
    graphs = dict(zip(names.split(), model.get_graphs_and_indices(data), strict=True))
    main, id_swap = graphs["main"], graphs["id_swap"]
    indices = {name: value for name, value in graphs.items() if "idx" in name}
    interaction_graphs = {f"{name}_graph": graphs[name] for name in ("a2a", "a2ee2a", "qint")}
    raw, atom_update, output, qint, e2e, a2e, e2a, a2a_rad = model.get_bases(
        main_graph=main, num_atoms=len(data.pos), **interaction_graphs, **indices
    )
    del interaction_graphs["qint_graph"]
    h = model.atom_emb(data.atomic_numbers.long())
    m = model.edge_emb(h, raw, main["edge_index"])
    states = {}
    out_nodes, out_edges = [], []
    for k, out_block in enumerate(model.out_blocks):
        if k:
            h, m = model.int_blocks[k - 1](
                h=h,
                m=m,
                bases_qint=qint,
                bases_e2e=e2e,
                bases_a2e=a2e,
                bases_e2a=e2a,
                basis_a2a_rad=a2a_rad,
                basis_atom_update=atom_update,
                edge_index_main=main["edge_index"],
                id_swap=id_swap,
                **interaction_graphs,
                **indices,
            )
        states |= {f"node@{k}": h, f"edge@{k}": m}
        x_node, x_edge = out_block(h, m, output, main["edge_index"][1])
        states |= {f"out_node@{k}": x_node, f"out_edge@{k}": x_edge}
        out_nodes.append(x_node)
        out_edges.append(x_edge)
    states["node"] = model.out_mlp_E(torch.cat(out_nodes, -1))
    states["atom_energy"] = model.out_energy(states["node"].float())
    if model.direct_forces:
        states["edge"] = model.out_mlp_F(torch.cat(out_edges, -1))
    return states


RECOMPUTE = {
    "painn": expected_painn,
    "schnet": expected_schnet,
    "gemnet_oc": expected_gemnet_oc,
}


# for those of irreps see test_spherical.py
@pytest.mark.parametrize(
    "flavour", [n for n in FLAVOURS if "hydra" not in n and n not in models.SPHERICAL]
)
def test_values_against_a_plain_loop_over_the_layers(flavour: str) -> None:
    model, data = small(flavour), batch()
    features, _ = extract(model, data)
    recompute = next(f for name, f in RECOMPUTE.items() if flavour.startswith(name))
    expected = recompute(model, data)
    num_atoms = len(data.pos)
    compared = set()
    for (address, form), feature in features.items():
        source = address
        if form == "vector" and address not in expected and "@" in address:
            source = address.replace("vector", "edge")
        if address == "vector" and flavour == "gemnet_oc":
            source = "edge"
        if address == "vector" and flavour.startswith("painn"):
            source = "vector@3" if flavour == "painn" else "vector@2"
        if address == "edge" and flavour.startswith("painn"):
            source = "edge@3" if flavour == "painn" else "edge@2"
        if address == "atom_energy" and flavour.startswith("painn"):
            continue  # see the test of energies
        values = expected[source]
        if source.partition("@")[0] in ("edge", "out_edge") and form != "edge":
            edge = features[Request(source, "edge")]
            messages = values
            if form == "vector":
                messages = values[:, None, :] * edge.edge_vectors[:, :, None]
            values = values.new_zeros(num_atoms, *messages.shape[1:])
            values.index_add_(0, edge.edge_index[1], messages)
        torch.testing.assert_close(feature.values, values, msg=lambda m, a=address: f"{a}: {m}")
        compared.add(source)
    missing = {
        key for key in expected if key not in compared and torch.is_tensor(expected[key])
    }  # x_F of output blocks is the number 0 without direct forces
    assert not missing


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_promised_shapes_and_kinds(flavour: str) -> None:
    model, data = small(flavour), batch()
    extractor = FeatureExtractor(model, all_requests(model))
    with extractor.capture() as captured:
        model(data)
    for request, spec in extractor.specs.items():
        feature = captured[request]
        rows = len(data.pos) if spec.kind != "edge" else feature.edge_index.shape[1]
        middle = (3,) if spec.kind == "vector" else ()
        assert spec.kind == request.form
        assert feature.spec == spec
        assert feature.values.shape == (rows, *middle, spec.channels)
        assert spec.shape == f"({'E' if spec.kind == 'edge' else 'N'}{', 3' * len(middle)}, " + (
            f"{spec.channels})"
        )
        assert feature.values.abs().max() > 0
        if spec.kind != "edge":
            assert feature.edge_index is None
            assert feature.edge_vectors is None
            assert feature.cell_offsets is None


@pytest.mark.parametrize("flavour", WITH_EDGES)
def test_edges_are_described_by_one_convention(flavour: str) -> None:
    model, data = small(flavour), batch()
    (feature,) = extract(model, data, [("edge@1", "edge")])[0].values()
    source, target = feature.edge_index
    cells = data.cell.double()[data.batch[source]]
    image = data.pos[source] + torch.einsum("ei,eij->ej", feature.cell_offsets.double(), cells)
    span = data.pos[target] - image
    torch.testing.assert_close(feature.edge_vectors.norm(dim=1), torch.ones(len(source)))
    torch.testing.assert_close(
        feature.edge_vectors, span / span.norm(dim=1, keepdim=True), rtol=0, atol=1e-6
    )
    assert span.norm(dim=1).max() <= 4.5 + 1e-6
    assert feature.cell_offsets.abs().max() > 0  # the test sees periodic images


@pytest.mark.parametrize("flavour", ["painn", "gemnet_oc"])
def test_layers_are_concatenated_on_the_channels(flavour: str) -> None:
    model, data = small(flavour), batch()
    for address, form in [
        ("node@2+0", "node"),
        ("edge@1+2", "edge"),
        ("edge@2+1", "node"),
        ("edge@1+2", "vector"),
        ("vector@1+2", "vector"),
    ]:
        name, _, layers = address.partition("@")
        singles = [Request(f"{name}@{layer}", form) for layer in layers.split("+")]
        joined = Request(address, form)
        extractor = FeatureExtractor(model, [joined, *singles])
        with extractor.capture() as captured:
            model(data)
        parts = [captured[single] for single in singles]
        torch.testing.assert_close(
            captured[joined].values, torch.cat([p.values for p in parts], -1), rtol=0, atol=0
        )
        assert captured[joined].spec.channels == sum(p.spec.channels for p in parts)
        assert extractor.specs[joined] == captured[joined].spec
        assert (captured[joined].edge_index is not None) == (form == "edge")
