"""Forces as the slope of a stock model's energy: finite differences, symmetries, refusals."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from fairchem.core.modules.normalization.normalizer import Normalizer
from models import batch, default_dtype, model_config, small_model, structures
from torch import Tensor, nn

from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import needs_autograd
from fairchem_kd.features.facts import facts
from fairchem_kd.stock.conservative import check_conservative, is_conservative
from fairchem_kd.stock.gradient_forces import (
    check_gradient_forces,
    close_at_cutoff,
    give_gradient_forces,
    has_gradient_forces,
)
from fairchem_kd.stock.graphs import use_our_radius_graph

ENERGY_RMSD, FORCES_RMSD = 2.0, 1.5


def normalizers(mean: float = 0.0) -> dict[str, Normalizer]:
    energy = Normalizer(torch.tensor(3.0), torch.tensor(ENERGY_RMSD))
    return {
        "energy": energy,
        "forces": Normalizer(torch.tensor(mean), torch.tensor(FORCES_RMSD)),
    }


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    use_our_radius_graph()
    with default_dtype(torch.float64):
        yield


def potential(flavour: str = "painn_energy", **overrides: Any) -> nn.Module:
    model = small_model(flavour, dtype=torch.float64, **overrides)
    give_gradient_forces(model, normalizers())
    return model.eval()


def energies(model: nn.Module, data: Any) -> Tensor:
    """``(B,)`` in eV."""
    with torch.no_grad():
        return ENERGY_RMSD * model(data)["energy"].view(-1).double() + 3.0


def forces(model: nn.Module, data: Any) -> Tensor:
    """``(N, 3)`` in eV/Å."""
    with torch.no_grad():
        return FORCES_RMSD * model(data)["forces"]


def systems(count: int = 2, **more: Any) -> Any:
    return batch(structures(count), dtype=torch.float64, **more)


def turned(data: Any, matrix: np.ndarray) -> Any:
    """Positions and cells turned (or mirrored) by ``matrix``."""
    made, turn = data.clone(), torch.tensor(matrix)
    made.pos = data.pos @ turn.T
    made.cell = (data.cell.double() @ turn.T).float()
    return made


@pytest.mark.parametrize(
    ("flavour", "options"),
    [
        ("painn_energy", {}),
        ("painn_energy", {"use_pbc": False}),
        ("painn_energy", {"use_pbc_single": True}),
        ("schnet_energy", {}),
    ],
)
def test_forces_are_the_slope_of_the_energy(flavour: str, options: dict[str, Any]) -> None:
    model, data, step = potential(flavour, **options), systems(), 1e-4
    found, start = forces(model, data), data.pos.clone()
    for atom in (0, 7, 12, 13, 20, len(start) - 1):
        for axis in range(3):
            ends = []
            for sign in (1, -1):
                data.pos = start.clone()
                data.pos[atom, axis] += sign * step
                ends.append(energies(model, data).sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(found[atom, axis]) == pytest.approx(float(-slope), abs=2e-6)
    assert found.abs().max() > 0.1


def test_gemnet_oc_has_stocks_own_gradient_forces() -> None:
    """Its last layer computes in float32, too coarse for differences; stock's gradient is right."""
    stock = small_model("gemnet_oc_gradient").eval()
    ours = small_model("gemnet_oc_energy").eval()
    ours.load_state_dict(stock.state_dict())
    give_gradient_forces(ours, {})
    with default_dtype(torch.float32):
        data = batch(structures(2))
        expected = stock(data.clone())["forces"].detach()
        with torch.no_grad():
            torch.testing.assert_close(ours(data)["forces"], expected, rtol=1e-4, atol=1e-5)


def test_it_is_equivariant_and_no_force_is_left_over() -> None:
    model, data = potential(), systems(3)
    found, level = forces(model, data), energies(model, data)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    for matrix in (turn, -turn, np.diag([1.0, 1.0, -1.0])):
        other = turned(data, matrix)
        # the turned cell is float32, as stock's graphs need it
        torch.testing.assert_close(energies(model, other), level, rtol=0, atol=1e-5)
        expected = found @ torch.tensor(matrix).T
        torch.testing.assert_close(forces(model, other), expected, rtol=0, atol=1e-5)
    moved = data.clone()
    moved.pos = data.pos + torch.tensor([0.3, -1.1, 0.7])
    torch.testing.assert_close(forces(model, moved), found, rtol=0, atol=1e-9)
    for system in range(3):
        total = found[data.batch == system].sum(dim=0)
        assert total.abs().max() < 1e-10


def test_order_of_atoms_and_company_do_not_matter() -> None:
    model, slabs = potential(), structures(3)
    together = forces(model, batch(slabs, dtype=torch.float64))
    alone = [forces(model, batch([one], dtype=torch.float64)) for one in slabs]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)
    order = np.random.default_rng(0).permutation(len(slabs[1]))
    shuffled = slabs[1][order]
    shuffled.calc = slabs[1].calc
    found = forces(model, batch([shuffled], dtype=torch.float64))
    torch.testing.assert_close(found, alone[1][torch.tensor(order)], rtol=0, atol=1e-10)


def test_a_structure_may_lie_across_the_cells_faces() -> None:
    model, slab = potential(), structures(1)[0]
    found = forces(model, batch([slab], dtype=torch.float64))
    slab.positions += 0.37 * slab.cell.sum(axis=0)
    slab.wrap()
    other = forces(model, batch([slab], dtype=torch.float64))
    torch.testing.assert_close(other, found, rtol=0, atol=1e-5)  # the cell is float32


def test_the_energy_does_not_jump_at_the_cutoff() -> None:
    """Three atoms, one of which leaves the reach of the two others; trained, so biases count."""
    model = potential()
    atoms = structures(1)[0][:3]
    atoms.set_constraint()
    atoms.calc = EMT()
    atoms.positions = [(0.0, 0.0, 0.0), (0.0, 2.0, 0.0), (4.4, 0.0, 0.0)]
    atoms.cell = [30.0, 30.0, 30.0]
    data = batch([atoms], dtype=torch.float64)

    def across() -> float:
        ends = []
        for place in (4.5 - 1e-6, 4.5 + 1e-6):
            data.pos[2, 0] = place
            ends.append(energies(model, data))
        return float((ends[1] - ends[0]).abs())

    assert across() < 1e-6
    model(data)["forces"].square().sum().backward()
    biases = [layer.rbf_proj.bias for layer in model.message_layers]
    assert all(bias.grad is None or not bias.grad.any() for bias in biases)
    with torch.no_grad():
        for bias in biases:
            bias.add_(0.1)
    assert across() > 1e-4
    close_at_cutoff(model, None)
    assert across() < 1e-6


def test_a_loss_on_forces_reaches_the_weights() -> None:
    model, data = potential(), systems(1)
    model.train()
    weight = model.message_layers[0].x_proj[0].weight

    def loss() -> Tensor:
        return model(data)["forces"].square().sum()

    loss().backward()
    assert weight.grad is not None
    slope, step = float(weight.grad[1, 2]), 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * step
        ends.append(loss().item())
        with torch.no_grad():
            weight[1, 2] -= sign * step
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_model_batch_and_mode_stay_as_they_were() -> None:
    plain, data = small_model("painn_energy", dtype=torch.float64).eval(), systems(1)
    model = copy.deepcopy(plain)
    before = {name: value.clone() for name, value in data.to_dict().items()}
    give_gradient_forces(model, {})
    give_gradient_forces(model, {})  # once more changes nothing
    assert type(model).__name__ == type(plain).__name__
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        out = model(data)
        assert not torch.is_grad_enabled()
        assert torch.equal(out["energy"], plain(data)["energy"])
    assert not out["forces"].requires_grad
    assert not out["energy"].requires_grad
    assert not data.pos.requires_grad
    assert all(torch.equal(data[name], value) for name, value in before.items())
    twice = copy.deepcopy(model)(data)["forces"]
    assert twice.requires_grad
    torch.testing.assert_close(twice.detach(), out["forces"])
    assert has_gradient_forces(model)
    assert not has_gradient_forces(plain)
    assert needs_autograd(model)
    assert not needs_autograd(plain)
    assert facts(model)["forces"] == "gradient"
    assert facts(plain)["forces"] == "none"


def test_positions_that_are_followed_stay_so() -> None:
    """For rows of the forces' Jacobian, say."""
    model, data = potential(), systems(1)
    data.pos = data.pos.clone().requires_grad_(True)
    (row,) = torch.autograd.grad(model(data)["forces"][5, 0], data.pos)
    assert row.abs().max() > 1e-3
    assert row[:, 0].sum().abs() < 1e-8  # a shift of everything changes no force


@pytest.mark.parametrize(
    ("flavour", "options", "words"),
    [
        ("painn", {}, "model.regress_forces is not false"),
        ("schnet", {}, "model.regress_forces is not false"),
        ("gemnet_oc_energy", {"direct_forces": True}, "direct_forces: false"),
        ("painn_hydra", {}, "not for HydraModel"),
    ],
)
def test_other_models_are_refused(flavour: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        give_gradient_forces(small_model(flavour, **options), {})


def test_forces_that_are_shifted_are_refused() -> None:
    model = potential()
    check_gradient_forces(model, normalizers())
    with pytest.raises(UserError, match=r"mean 0\.25.*set that mean to 0"):
        check_gradient_forces(model, normalizers(mean=0.25))


@pytest.mark.parametrize("flavour", ["schnet", "esen_hydra_gradient"])
def test_stocks_gradient_forces_with_two_units_are_told(
    flavour: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Forces in eV/Å are 1.5 / 2 of the slope of the energy in eV; of a hydra's too."""
    model = small_model(flavour)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for silent in (normalizers() | {"energy": normalizers()["forces"]}, {}):
            check_gradient_forces(model, silent)
        check_gradient_forces(small_model("painn"), normalizers())
        assert not caplog.messages
        check_gradient_forces(model, normalizers())
    assert "0.75 times" in caplog.messages[0]


def config(**more: Any) -> dict[str, Any]:
    return {
        "trainer": "fairchem_kd.DistillationTrainer",
        "task": {"conservative": True},
        "model": model_config("painn_energy"),
        "outputs": {"energy": {"level": "system"}, "forces": {"level": "atom"}},
        "loss_functions": [{"energy": {"fn": "mae"}}, {"forces": {"fn": "l2mae"}}],
        **more,
    }


@pytest.mark.parametrize("given", [True, "true", "yes"])
def test_the_key_is_read_as_any_other(given: Any) -> None:
    found = config(task={"conservative": given})
    check_conservative(found, ours=True)
    assert found["task"]["conservative"] is True


@pytest.mark.parametrize("given", [None, "null", False, "off"])
def test_without_it_nothing_is_asked(given: Any) -> None:
    found = {"task": {"conservative": given}}
    assert not is_conservative(found)
    assert not is_conservative({})
    check_conservative(found, ours=False)


@pytest.mark.parametrize(
    ("changed", "ours", "words"),
    [
        ({"task": {"conservative": 1}}, True, "task.conservative must be true or false"),
        ({"task": {"conservative": "gradient"}}, True, "must be true or false"),
        ({"trainer": "ocp"}, False, "the trainer is 'ocp'"),
        ({"model": {"name": "painn"}}, True, "regress_forces: false"),
        ({"model": {"name": "painn", "regress_forces": None}}, True, "regress_forces: false"),
        ({"outputs": {"energy": {}}}, True, "outputs has no 'forces'"),
        ({"outputs": {"forces": {}}}, True, "outputs has no 'energy'"),
        ({"loss_functions": [{"forces": {"fn": "l2mae"}}]}, True, "needs a loss on the energy"),
        ({"loss_functions": None}, True, "needs a loss on the energy"),
        ({"amp": True}, True, "amp: false"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    changed: dict[str, Any], ours: bool, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_conservative(config(**changed), ours=ours)
