"""EquiformerV2, eSCN and eSEN: their irreps against e3nn, and against loops over their layers."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from captures import batch, extract, small
from captures import float64 as float64
from e3nn import o3
from fairchem.core.models.equiformer_v2.so3 import SO3_Embedding as EquiformerState
from fairchem.core.models.escn.so3 import CoefficientMapping, SO3_Rotation
from fairchem.core.models.escn.so3 import SO3_Embedding as ESCNState
from test_feature_symmetry import transformed
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request, architecture_of, available_features
from fairchem_kd.features.architecture import draws_numbers
from fairchem_kd.features.so3 import Irreps
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import LiveTeacher

DIRECT = ["equiformer_v2", "equiformer_v2_hydra", "escn", "escn_hydra", "esen_hydra"]
OUTPUTS = {"energy": {"level": "system"}, "forces": {"level": "atom"}}


def backbone(model: nn.Module) -> Any:
    return getattr(model, "backbone", model)


def last_state(model: nn.Module, data: Any) -> torch.Tensor:
    """All coefficients (N, K, C) of the state that the heads of a model take in."""
    seen: list[torch.Tensor] = []
    inner = backbone(model)
    if hasattr(inner, "norm"):
        inner.norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    else:
        inner.layer_blocks[-1].register_forward_hook(
            lambda _, args, out: seen.append(args[0].embedding + out.embedding)
        )
    model(data)
    return seen[0].detach()


@pytest.mark.parametrize("flavour", ["equiformer_v2", "escn", "esen_hydra", "esen_hydra_gradient"])
def test_states_turn_as_e3nn_turns_irreps(flavour: str) -> None:
    """All degrees, in e3nn's order; and of degree 1 that is the rotation of (x, y, z) itself."""
    slabs = models.structures(2)
    moved, matrix, _ = transformed(slabs, "rotation")
    before = last_state(small(flavour), batch(slabs))
    after = last_state(small(flavour), batch(moved))
    degrees = o3.Irreps("0e + 1o + 2e")
    turn = degrees.D_from_matrix(matrix.double())
    torch.testing.assert_close(turn[1:4, 1:4], matrix.double(), rtol=0, atol=1e-6)
    expected = torch.einsum("kj,njc->nkc", turn, before)
    scale = before.abs().max()
    torch.testing.assert_close(after / scale, expected / scale, rtol=0, atol=1e-4)
    turned, whole = (after - before)[:, 1:], before[:, 1:]
    assert turned.abs().max() > 0.1 * whole.abs().max()  # the test turns something
    features, _ = extract(small(flavour), batch(slabs), [("node", "node")])
    torch.testing.assert_close(features["node", "node"].values, before[:, 0])


@pytest.mark.parametrize("flavour", ["equiformer_v2", "esen_hydra"])
def test_vectors_point_from_the_target_to_the_source(flavour: str) -> None:
    """Before the first block, a vector is a weight of the distance times e3nn's harmonics."""
    model, data = small(flavour), batch(models.structures(1))
    requests = [("vector@0", "vector"), ("edge", "edge")]
    features, _ = extract(model, data, requests)
    edge = features["edge", "edge"]
    inner = backbone(model)
    seen: list[torch.Tensor] = []
    inner.edge_degree_embedding.rad_func.register_forward_hook(lambda *args: seen.append(args[-1]))
    model(batch(models.structures(1)))
    radial = seen[0].view(len(edge.edge_vectors), 3, -1)[:, 1]  # of l = 1, m = 0
    # a message of m = 0 along the edge is what e3nn's harmonics of that direction are
    harmonics = o3.spherical_harmonics(1, -edge.edge_vectors, True, "norm")  # source - target
    vectors = torch.zeros_like(features["vector@0", "vector"].values)
    vectors.index_add_(0, edge.edge_index[1], harmonics[:, :, None] * radial[:, None])
    factor = 5.0 if flavour == "esen_hydra" else inner.avg_degree
    torch.testing.assert_close(features["vector@0", "vector"].values, vectors / factor)


def test_default_vectors_reach_an_output_without_a_head_for_forces() -> None:
    model = small("equiformer_v2", regress_forces=False)
    features, _ = extract(model, batch(), [("vector", "vector"), ("vector@1", "vector")])
    assert torch.equal(*(feature.values for feature in features.values()))


def test_vectors_of_esen_give_its_forces() -> None:
    model, data = small("esen_hydra"), batch()
    features, outputs = extract(model, data, [("vector", "vector")])
    weight = model.output_heads["forces"].linear.weight[1]  # of l = 1, (1, C)
    forces = (features["vector", "vector"].values @ weight.T).squeeze(-1)
    torch.testing.assert_close(forces, outputs["forces"])


def test_vectors_of_escn_are_those_of_its_function_on_the_sphere() -> None:
    """eSCN's heads take in f(p), the sum of coefficients times e3nn's integral harmonics at p."""
    model = small("escn", num_sphere_samples=600)
    seen: list[torch.Tensor] = []
    model.energy_block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, _ = extract(model, batch(), [("node", "node"), ("vector", "vector")])
    values = seen[0].view(len(batch().pos), 600, -1).double()
    points = model.sphere_points.double()
    mean = values.mean(1) * (4 * torch.pi) ** 0.5
    slope = torch.einsum("npc,px->nxc", values, points) / 600 * (3 * 4 * torch.pi) ** 0.5
    node, vector = (feature.values for feature in features.values())
    scale = node.abs().max()
    torch.testing.assert_close(mean / scale, node / scale, rtol=0, atol=1e-2)
    torch.testing.assert_close(slope / scale, vector / scale, rtol=0, atol=1e-2)


def equiformer_states(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    inner = backbone(model)
    torch.manual_seed(0)
    graph = inner.generate_graph(data)
    inner.SO3_rotation[0].set_wigner(inner._init_edge_rot_mat(None, None, graph.edge_distance_vec))
    numbers = data.atomic_numbers.long()
    x = EquiformerState(len(numbers), inner.lmax_list, inner.sphere_channels, "cpu", torch.float64)
    x.embedding[:, 0] = inner.sphere_embedding(numbers)
    radial = inner.distance_expansion(graph.edge_distance)
    degree = inner.edge_degree_embedding(numbers, radial, graph.edge_index, len(numbers))
    x.embedding = x.embedding + degree.embedding
    states = {"0": x.embedding}
    for k, block in enumerate(inner.blocks, start=1):
        x = block(x, numbers, radial, graph.edge_index, batch=data.batch)
        states[str(k)] = x.embedding
    states[""] = inner.norm(x.embedding)
    return states


def escn_states(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    inner = backbone(model)
    torch.manual_seed(0)
    graph = inner.generate_graph(data)
    turn = SO3_Rotation(inner._init_edge_rot_mat(data, None, graph.edge_distance_vec), 2)
    numbers = data.atomic_numbers.long()
    x = ESCNState(len(numbers), [2], inner.sphere_channels, "cpu", torch.float64)
    x.embedding[:, 0] = inner.sphere_embedding(numbers)
    mapping = CoefficientMapping([2], [2], "cpu")
    states = {"0": x.embedding}
    for k, layer in enumerate(inner.layer_blocks, start=1):
        more = layer(x, numbers, graph.edge_distance, graph.edge_index, [turn], mapping)
        whole = more.embedding if k == 1 else x.embedding + more.embedding
        x = more.clone()
        x.embedding = whole
        states[str(k)] = whole
    states[""] = x.embedding
    return states


def esen_states(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    inner = backbone(model)
    torch.manual_seed(0)
    graph = inner.generate_graph(data)
    source, target = graph["edge_index"]
    _, turn, back = inner.get_rotmat_and_wigner(graph["edge_distance_vec"])
    numbers = data.atomic_numbers.long()
    x = torch.zeros(len(numbers), 9, inner.sphere_channels)
    x[:, 0] = inner.sphere_embedding(numbers)
    radial = inner.distance_expansion(graph["edge_distance"])
    pair = [inner.source_embedding(numbers[source]), inner.target_embedding(numbers[target])]
    edges = torch.cat([radial, *pair], dim=1)
    geometry = graph["edge_distance"], graph["edge_index"]
    x = inner.edge_degree_embedding(x, edges, *geometry, back)
    states = {"0": x}
    for k, block in enumerate(inner.blocks, start=1):
        x = block(x, edges, *geometry, turn, back)
        states[str(k)] = x
    states[""] = inner.norm(x)
    return states


LOOPS = {"equiformer": equiformer_states, "escn": escn_states, "esen": esen_states}


@pytest.mark.parametrize("flavour", models.SPHERICAL)
def test_states_against_a_plain_loop_over_the_layers(flavour: str) -> None:
    model = small(flavour)
    states = next(loop for name, loop in LOOPS.items() if flavour.startswith(name))(model, batch())
    features, _ = extract(model, batch())
    compared = 0
    for (address, _), feature in features.items():
        name, _, layer = address.partition("@")
        if name == "node":
            expected = states[layer][:, 0]
        elif name == "vector":
            default = "1" if flavour == "esen_hydra_gradient" else ""
            expected = states[layer or default][:, 1:4]
        else:
            continue
        torch.testing.assert_close(feature.values, expected, msg=lambda m, a=address: f"{a}: {m}")
        compared += 1
    assert compared == (7 if flavour.startswith("escn") else 8)


@pytest.mark.parametrize("flavour", ["equiformer_v2", "escn", "esen_hydra", "esen_hydra_gradient"])
def test_messages_are_what_is_summed(flavour: str) -> None:
    """Summed onto their targets they are what the layer goes on with; each on its own is checked
    where only one reaches an atom."""
    model = small(flavour)
    inner, seen = backbone(model), []
    if flavour == "equiformer_v2":
        hook = lambda _, args: seen.append(args[0].embedding[:, 0])  # noqa: E731
        inner.blocks[1].ga.proj.register_forward_pre_hook(hook)
    elif flavour == "escn":
        hook = lambda _, args, out: seen.append(out.embedding[:, 0].clone())  # noqa: E731
        inner.layer_blocks[1].message_block.register_forward_hook(hook)
    else:
        hook = lambda _, args, out: seen.append(out[:, 0])  # noqa: E731
        inner.blocks[1].edge_wise.register_forward_hook(hook)
    features, _ = extract(
        model, batch(), [("edge", "edge"), ("edge@2", "node"), ("edge@1", "edge")]
    )
    torch.testing.assert_close(features["edge@2", "node"].values, seen[0])
    edge = features["edge", "edge"]
    summed = torch.zeros_like(seen[0]).index_add_(0, edge.edge_index[1], edge.values)
    torch.testing.assert_close(summed, seen[0])
    assert not torch.allclose(features["edge@1", "edge"].values, edge.values)

    pair = models.structures(1)[0][:2]
    pair.set_positions([[0.0, 0.0, 0.0], [0.4, 2.1, 0.9]])
    pair.set_cell([30.0, 30.0, 30.0])
    pair.calc = type(models.structures(1)[0].calc)()
    seen.clear()
    features, _ = extract(model, batch([pair]), [("edge", "edge")])
    edge = features["edge", "edge"]
    assert edge.edge_index[1].tolist() == [0, 1] or edge.edge_index[1].tolist() == [1, 0]
    torch.testing.assert_close(edge.values, seen[0][edge.edge_index[1]])


@pytest.mark.parametrize("flavour", DIRECT)
def test_a_reflection_is_another_structure_to_these_models(flavour: str) -> None:
    """By construction: what they do in an edge's frame knows left from right."""
    slabs = models.structures(2)
    moved, matrix, _ = transformed(slabs, "reflection")
    before, _ = extract(small(flavour), batch(slabs), detach=True)
    after, _ = extract(small(flavour), batch(moved), detach=True)
    worst = 0.0
    for request, feature in before.items():
        if request.form == "edge":
            continue
        expected = feature.values
        if request.form == "vector":
            expected = torch.einsum("xy,nyc->nxc", matrix.double(), expected)
        difference = (after[request].values - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.item())
    assert 1e-4 < worst < 1


def test_forces_of_esen_are_the_gradient_of_its_energy() -> None:
    model = small("esen_hydra_gradient").eval()
    data = batch(models.structures(1))
    forces = model(copy.copy(data))["forces"].detach()
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(data.pos.shape, generator=generator)
    step, energies = 1e-4, []
    for sign in (1, -1):
        moved = batch(models.structures(1))
        moved.pos = data.pos.detach() + sign * step * direction
        energies.append(model(moved)["energy"].item())
    slope = (energies[0] - energies[1]) / (2 * step)
    assert -(forces * direction).sum().item() == pytest.approx(slope, rel=1e-4)


# -- random numbers -------------------------------------------------------------------------------


def free(flavour: str) -> nn.Module:
    """The model with frames as fairchem draws them."""
    model = models.small_model(flavour)
    model._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("flavour", ["equiformer_v2", "escn_hydra", "esen_hydra"])
def test_a_teacher_draws_the_same_frames_and_leaves_the_generators_alone(flavour: str) -> None:
    with models.default_dtype(torch.float32):
        live = LiveTeacher(Teacher(free(flavour), Units({}, {}), OUTPUTS))
        requests = [Request("node", "node"), Request("edge", "edge"), Request("vector", "vector")]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = live.teach(models.batch(), requests)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        second = live.teach(models.batch(), requests)
        for name in OUTPUTS:
            assert torch.equal(first.outputs[name], second.outputs[name])
        for request in requests:
            assert torch.equal(first.features[request], second.features[request])
        # frames of its own are what stock would draw
        model = free(flavour).eval()
        torch.manual_seed(7)
        drawn = [model(models.batch())["forces"] for _ in range(2)]
        assert not torch.equal(*drawn)
        torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


def test_who_draws() -> None:
    for flavour in ("painn", "schnet", "gemnet_oc", "equiformer_v2", "escn", "esen_hydra"):
        assert draws_numbers(models.small_model(flavour)) == (flavour in models.SPHERICAL), flavour
    assert draws_numbers(nn.Linear(2, 2))  # not known


# -- what is not offered --------------------------------------------------------------------------


def test_irreps_of_several_resolutions() -> None:
    irreps = Irreps((1, 0, 2), 2)
    state = torch.arange(2 * 14 * 2).view(2, 14, 2)
    assert torch.equal(irreps.scalars(state), torch.cat([state[:, k] for k in (0, 4, 5)], 1))
    vectors = torch.cat([state[:, 1:4], state[:, 6:9]], 2)
    assert torch.equal(irreps.vectors(state), vectors)
    assert (irreps.scalar_channels, irreps.vector_channels) == (6, 4)
    assert irreps.scalars(state).data_ptr() != state.data_ptr()  # holds no more than it shows


def test_a_scalar_is_not_a_view_of_all_degrees() -> None:
    assert Irreps((2,), 3).scalars(torch.zeros(4, 9, 3)).untyped_storage().nbytes() == 4 * 3 * 8


@pytest.mark.parametrize(
    ("flavour", "options", "address", "message"),
    [
        (
            "equiformer_v2_hydra",
            {"activation_checkpoint": True},
            "edge",
            "activation checkpointing",
        ),
        ("equiformer_v2_hydra", {"activation_checkpoint": True}, "edge@1", "checkpointing"),
        ("esen_hydra", {"activation_checkpointing": True}, "edge", "activation checkpointing"),
        ("escn_hydra", {"lmax_list": [0], "mmax_list": [0]}, "vector", "the highest degree"),
    ],
)
def test_what_a_model_cannot_offer_is_said(
    flavour: str, options: dict[str, Any], address: str, message: str
) -> None:
    block = models.model_config(flavour)
    block["backbone"] |= options
    model = models.build_model(block)
    form = "vector" if address == "vector" else "node"
    with pytest.raises(UserError, match=message):
        FeatureExtractor(model, [Request(address, form)])


def with_heads(flavour: str, **heads: dict[str, Any]) -> nn.Module:
    block = models.model_config(flavour)
    first = next(iter(block["heads"].values()))
    block["heads"] = {name: {**first, **options} for name, options in heads.items()}
    return models.build_model(block)


@pytest.mark.parametrize("flavour", ["equiformer_v2_hydra", "escn_hydra", "esen_hydra"])
def test_averages_have_no_energies_of_atoms(flavour: str) -> None:
    model = with_heads(flavour, energy={"reduce": "mean"})
    assert "atom_energy" not in available_features(model)
    assert "averages over atoms" in architecture_of(model).absent["atom_energy"]


def test_heads_are_known_by_the_outputs_that_they_name() -> None:
    named = {"first": {"output_name": "energy"}, "second": {"output_name": "gap"}}
    model = with_heads("equiformer_v2_hydra", **named)
    offered = [a for a in available_features(model) if a.startswith("atom_energy")]
    assert offered == ["atom_energy", "atom_energy@energy", "atom_energy@gap"]
    features, outputs = extract(
        model.double(), batch(), [("atom_energy", "node"), ("atom_energy@gap", "node")]
    )
    for values, name in zip(features.values(), ("energy", "gap"), strict=True):
        atoms = values.values.squeeze(1)
        total = torch.zeros(len(outputs[name])).index_add(0, batch().batch, atoms)
        torch.testing.assert_close(total, outputs[name])


def test_references_of_elements_are_in_no_atom_of_equiformer_v2() -> None:
    model = small("equiformer_v2", use_energy_lin_ref=True, load_energy_lin_ref=True)
    assert "use_energy_lin_ref" in architecture_of(model).absent["atom_energy"]
