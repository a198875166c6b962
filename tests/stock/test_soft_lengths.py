"""Soft lengths of a PaiNN's vectors: against loops in float64, and as weights of a stock model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fairchem.core.models.painn.painn import PaiNN, PaiNNUpdate
from models import batch, default_dtype, small_model, structures

from fairchem_kd.errors import UserError
from fairchem_kd.stock.soft_lengths import (
    averages_from_stock,
    averages_to_stock,
    soften_lengths,
    soften_weights,
)
from fairchem_kd.stock.softness import check_softness, halvings, softness

SOFT = 0.1
EFFECTIVE = 1e-4 * 2**10  #: the nearest power of two


def loop(update: PaiNNUpdate, weights: dict, x: Any, vec: Any, soft: float) -> tuple[list, list]:
    """An update of one atom, ``x`` (H,) and ``vec`` (3, H), in plain numbers."""
    width = update.hidden_channels

    def linear(name: str, given: list[float]) -> list[float]:
        rows = weights[f"{name}.weight"].tolist()
        shift = weights[f"{name}.bias"].tolist() if f"{name}.bias" in weights else [0.0] * len(rows)
        return [sum(w * g for w, g in zip(r, given, strict=True)) + b
                for r, b in zip(rows, shift, strict=True)]  # fmt: skip

    axes = [linear("vec_proj", vec[k].tolist()) for k in range(3)]
    lengths = [math.sqrt(sum(axes[k][width + c] ** 2 for k in range(3)) + soft**2)
               for c in range(width)]  # fmt: skip
    hidden = linear("xvec_proj.0", x.tolist() + lengths)
    hidden = [h / (1 + math.exp(-h)) / 0.6 for h in hidden]
    out = linear("xvec_proj.2", hidden)
    dots = [sum(axes[k][c] * axes[k][width + c] for k in range(3)) / math.sqrt(width)
            for c in range(width)]  # fmt: skip
    dx = [(out[c] + out[width + c] * dots[c]) / math.sqrt(2) for c in range(width)]
    return dx, [[out[2 * width + c] * axes[k][c] for c in range(width)] for k in range(3)]


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of the vectors: both sides of the softness
def test_lengths_are_those_of_a_loop(scale: float) -> None:
    with default_dtype(torch.float64):
        model = small_model("painn_energy", dtype=torch.float64)
        update = model.update_layers[0]
        for parameter in update.parameters():  # biases are 0 at first
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator())
        parameters = {name: value.detach().clone() for name, value in update.named_parameters()}
        soften_lengths(model, SOFT)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, update.hidden_channels, generator=generator)
        vec = scale * torch.randn(2, 3, update.hidden_channels, generator=generator)
        dx, dvec = update(x, vec)
        for atom in range(2):
            expected = loop(update, parameters, x[atom], vec[atom], EFFECTIVE)
            torch.testing.assert_close(dx[atom], torch.tensor(expected[0]), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(dvec[atom], torch.tensor(expected[1]), rtol=1e-9, atol=1e-12)


def test_the_saved_weights_are_a_stock_model_with_the_same_bits() -> None:
    for flavour in ("painn", "painn_energy"):
        model, stock = small_model(flavour).eval(), small_model(flavour, seed=1).eval()
        names = list(model.state_dict())
        before = model(batch(structures(2)))["energy"].detach()
        soften_lengths(model, SOFT)
        assert list(model.state_dict()) == names
        stock.load_state_dict(model.state_dict())
        found, expected = stock(batch(structures(2))), model(batch(structures(2)))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert not torch.allclose(found["energy"], before, rtol=1e-3)  # another than it was
        assert type(stock) is PaiNN


def test_loading_is_the_inverse_of_saving() -> None:
    model = small_model("painn_energy")
    soften_lengths(model, SOFT)
    soften_lengths(model, SOFT)  # a second time changes nothing
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    given = {name: value.clone() for name, value in model.state_dict().items()}
    saved = copy.deepcopy(given)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(given)
    assert all(torch.equal(value, kept[name]) for name, value in model.named_parameters())
    assert all(torch.equal(given[name], value) for name, value in saved.items())  # not written to
    # and a stock model's weights give that model
    stock = small_model("painn_energy", seed=5).eval()
    model.eval().load_state_dict(stock.state_dict())
    data = batch(structures(2))
    assert torch.equal(model(data)["energy"], stock(data)["energy"])


def test_averages_go_with_the_weights() -> None:
    model = small_model("painn_energy")
    model.atom_emb.embeddings.weight.requires_grad_(False)  # not averaged
    soften_lengths(model, SOFT)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages = [parameter.detach().clone() for parameter in trained.values()]
    saved = averages_to_stock(model, averages)
    state = model.state_dict()
    assert all(torch.equal(s, state[name]) for s, name in zip(saved, trained, strict=True))
    back = averages_from_stock(model, saved)
    assert all(torch.equal(one, other) for one, other in zip(back, averages, strict=True))


@pytest.mark.parametrize("before", [None, 0.01])
def test_softening_leaves_the_trained_numbers_as_they_were(before: float | None) -> None:
    """Another softness, with vectors that are as they were."""
    start, model = small_model("painn_energy"), small_model("painn_energy", seed=3)
    parameters = {name: value.detach().clone() for name, value in start.named_parameters()}
    if before is not None:
        soften_lengths(start, before)
    soften_lengths(model, SOFT)
    model.load_state_dict(start.state_dict())
    averages = [value.detach().clone() for value in model.parameters()]
    soften_weights(model, before, SOFT, averages)
    for (name, value), average in zip(model.named_parameters(), averages, strict=True):
        assert torch.equal(value, parameters[name]), name
        assert torch.equal(average, parameters[name]), name


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.soft_lengths is of the vector features of PaiNN"):
        soften_lengths(small_model("schnet_energy"), SOFT)


def test_a_hydra_with_a_painn_in_it_is_softened() -> None:
    model, stock = small_model("painn_hydra").eval(), small_model("painn_hydra", seed=1).eval()
    soften_lengths(model, SOFT)
    stock.load_state_dict(model.state_dict())
    data = batch(structures(2))
    found, expected = stock(data), model(data)
    assert torch.equal(found["energy"], expected["energy"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (True, "must be a number"),
        ("soft", "must be a number"),
        ("nan", "must be"),
        ([0.1], "must be a number"),
        (0, "must be at least 0.001"),
        (-0.1, "must be at least 0.001"),
        (2, "must be at most 1"),
    ],
)
def test_what_is_no_softness_is_refused(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"task\.soft_lengths {words}"):
        check_softness({"task": {"soft_lengths": given}}, ours=True)


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(UserError, match="the trainer is 'ocp'"):
        check_softness({"trainer": "ocp", "task": {"soft_lengths": 0.1}}, ours=False)
    with pytest.raises(UserError, match="set amp: false"):
        check_softness({"amp": True, "task": {"soft_lengths": 0.1}}, ours=True)
    config: dict[str, Any] = {"task": {"soft_lengths": "1e-1"}}
    check_softness(config, ours=True)
    assert config["task"]["soft_lengths"] == 0.1
    for nothing in ({}, {"task": None}, {"task": {"soft_lengths": "null"}}):
        assert softness(nothing) is None
    assert [halvings(s) for s in (None, 1e-3, 0.1, 1.0)] == [0, 3, 10, 13]
