"""The values of every feature of every architecture, against independent recomputations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request, available_features

FLAVOURS = sorted(models.CONFIGS)
WITH_EDGES = [name for name in FLAVOURS if not name.startswith("schnet")]


@pytest.fixture(autouse=True)
def _float64():
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


@pytest.mark.parametrize("flavour", [name for name in FLAVOURS if "hydra" not in name])
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


def transformed(slabs: list, kind: str) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Moved copies of ``slabs``, the matrix Q that their vectors turn with, the atoms' order."""
    generator = torch.Generator().manual_seed(7)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    rotation = rotation * rotation.det()
    matrix, moved, order, start = torch.eye(3), [], [], 0
    if kind in ("rotation", "reflection"):
        matrix = rotation if kind == "rotation" else -rotation
    for index, atoms in enumerate(slabs):
        energies = atoms.calc
        copy = atoms.copy()
        permutation = torch.arange(len(atoms))
        if kind == "permutation":
            permutation = torch.randperm(len(atoms), generator=generator)
            copy = copy[permutation.numpy()]
        if kind == "translation":
            copy.positions += [1.7, -2.3, 3.1 + index]
        copy.set_cell(copy.cell.array @ matrix.numpy().T, scale_atoms=False)
        copy.positions = copy.positions @ matrix.numpy().T
        copy.calc = type(energies)()
        moved.append(copy)
        order.append(permutation + start)
        start += len(atoms)
    return moved, matrix, torch.cat(order)


def edge_order(feature: Any, order: torch.Tensor | None = None) -> torch.Tensor:
    """Sort edges by target, source and cell offset, so that two graphs can be compared."""
    source, target = feature.edge_index if order is None else order[feature.edge_index]
    keys = torch.stack([target, source, *feature.cell_offsets.long().T]).tolist()
    return torch.tensor(sorted(range(len(source)), key=lambda e: [row[e] for row in keys]))


@pytest.mark.parametrize("kind", ["rotation", "reflection", "translation", "permutation"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scalars_are_invariant_and_vectors_turn(flavour: str, kind: str) -> None:
    model = small(flavour)
    slabs = models.structures(2)
    moved, matrix, order = transformed(slabs, kind)
    before, _ = extract(model, batch(slabs), detach=True)
    after, _ = extract(model, batch(moved), detach=True)
    for request, feature in before.items():
        expected, values = feature.values, after[request].values
        if request.form == "vector":
            expected = torch.einsum("xy,nyc->nxc", matrix.to(expected.dtype), expected)
        if request.form == "edge":
            expected = expected[edge_order(feature)]
            values = values[edge_order(after[request], order)]
        else:
            expected = expected[order]
        # fairchem keeps cells in float32, and with them the distances to periodic images
        scale = expected.abs().max()
        tolerance = 2e-5 if values.dtype == torch.float32 else 2e-6
        torch.testing.assert_close(
            values / scale,
            expected / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda m, r=request: f"{r}: {m}",
        )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outputs_with_a_capture_equal_those_without(flavour: str) -> None:
    model = models.small_model(flavour)
    with models.default_dtype(torch.float32):
        plain = model(models.batch())
        requests = all_requests(model)
        _, tapped = extract(model, models.batch(), requests)
        _, detached = extract(model, models.batch(), requests, detach=True)
    for outputs in (tapped, detached):
        assert outputs.keys() == plain.keys()
        assert all(torch.equal(outputs[key], plain[key]) for key in plain)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_model_is_untouched_outside_the_context(flavour: str) -> None:
    model, data = small(flavour), batch()

    def marks() -> list:
        return [
            (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ]

    before = marks()
    extractor = FeatureExtractor(model, all_requests(model))
    assert marks() == before
    with extractor.capture():
        assert marks() != before
        model(data)
    assert marks() == before
    with pytest.raises(ZeroDivisionError), extractor.capture():
        _ = 1 / 0
    assert marks() == before


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_kept_once_the_result_is_dropped(flavour: str) -> None:
    model, data = small(flavour), batch()
    extractor = FeatureExtractor(model, all_requests(model))
    gc.collect()
    gc.disable()  # reference counts alone have to free them
    try:
        with torch.no_grad(), extractor.capture(detach=True) as captured:
            outputs = model(data)
        kept = [weakref.ref(captured[request]) for request in extractor.specs]
        kept += [weakref.ref(captured[request].values) for request in extractor.specs]
        del captured, outputs
        assert not any(reference() is not None for reference in kept)
    finally:
        gc.enable()


def test_aggregated_edges_are_not_kept() -> None:
    model, data = small("gemnet_oc"), batch()
    seen = []
    handle = model.out_mlp_F.register_forward_hook(lambda *args: seen.append(weakref.ref(args[-1])))
    extractor = FeatureExtractor(model, [Request("edge", "node"), Request("vector", "vector")])
    with torch.no_grad(), extractor.capture():
        model(data)
        assert seen[0]() is None
    handle.remove()


def test_one_pass_gives_both_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairchem_kd.features import extractor as module

    model, data, calls = small("gemnet_oc"), batch(), []
    real = module.edge_to_node

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "edge_to_node", counted)
    extract(model, data, [("edge", "node"), ("edge", "vector"), ("vector", "vector")])
    assert len(calls) == 1
    calls.clear()
    extract(model, data, [("edge", "node"), ("edge@1", "edge"), ("node", "node")])
    assert len(calls) == 1
    assert "edge_vectors" not in calls[0]


@pytest.mark.parametrize("flavour", ["painn_gradient", "schnet", "gemnet_oc_gradient", "painn"])
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


def test_a_request_that_never_fires_or_fires_twice_is_named() -> None:
    model, data = small("painn"), batch()
    extractor = FeatureExtractor(model, [Request("node@2", "node")])
    with pytest.raises(RuntimeError, match=r"'node@2' of PaiNN fired never"), extractor.capture():
        pass
    both = nn.Sequential(model, nn.Identity())
    both.forward = lambda x: (model(x), model(x))
    with pytest.raises(RuntimeError, match=r"'node@2' of PaiNN fired 2 times"), extractor.capture():
        both(data)
    with extractor.capture() as captured:
        model(data)
        with pytest.raises(RuntimeError, match="context is left"):
            captured[Request("node@2", "node")]
    assert captured[Request("node@2", "node")].values.shape == (len(data.pos), 16)
    with pytest.raises(KeyError):
        captured[Request("node@1", "node")]


def test_another_shape_than_promised_is_named() -> None:
    model, data = small("schnet_energy"), batch()
    extractor = FeatureExtractor(model, [Request("atom_energy", "node")])
    model.lin2 = nn.Linear(10, 2)
    extractor = FeatureExtractor(model, [Request("atom_energy", "node")])
    with (
        pytest.raises(RuntimeError, match=r"'atom_energy'.*\[40, 2\] where \[40, 1\].*\(N, 1\)"),
        extractor.capture(),
    ):
        model(data)


def test_two_extractors_at_once() -> None:
    model, data = small("gemnet_oc"), batch()
    outer = FeatureExtractor(model, [Request("edge", "node")])
    inner = FeatureExtractor(model, [Request("vector", "vector"), Request("edge", "node")])
    with outer.capture() as first, inner.capture(detach=True) as second:
        model(data)
    torch.testing.assert_close(first["edge", "node"].values, second["edge", "node"].values)
    assert "get_graphs_and_indices" not in vars(model)


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


def test_unsupported_architectures_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"features of Linear .* GemNetOC, PaiNN, SchNetWrap"):
        available_features(nn.Linear(1, 1))


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


def test_nothing_requested_works_on_any_model():
    model = torch.nn.Linear(2, 2)
    extractor = FeatureExtractor(model, [])
    with extractor.capture():
        model(torch.ones(1, 2))
    assert extractor.specs == {}


@pytest.mark.parametrize(
    ("flavour", "override"), [("gemnet_oc", {"extensive": False}), ("schnet", {"readout": "mean"})]
)
def test_a_model_that_averages_over_atoms_has_no_atom_energies(flavour, override):
    model = models.small_model(flavour, **override)
    with pytest.raises(UserError, match="averages over atoms"):
        FeatureExtractor(model, [Request("atom_energy", "node")])


def test_what_is_around_the_taps_sees_each_of_them_once() -> None:
    """Of edges, with the sum over them; and no longer once it is taken away."""
    model, data = small("gemnet_oc"), batch()
    extractor = FeatureExtractor(model, [Request("node", "node"), Request("edge", "node")])
    inside: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    with extractor.capture() as expected:
        model(data.clone())
    extractor.around = around
    with extractor.capture() as captured:
        model(data.clone())
    assert inside == ["in", "out"] * 2
    for request in extractor.specs:
        assert torch.equal(captured[request].values, expected[request].values)
    extractor.around = None
    with extractor.capture():
        model(data.clone())
    assert len(inside) == 4
