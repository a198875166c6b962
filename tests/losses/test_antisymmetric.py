"""The antisymmetric part of the Jacobian of forces: against finite differences in float64 loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from terms import FREE, NATOMS, WHERE, compare, label_losses, random, value
from torch import Tensor

from fairchem_kd import Distiller
from fairchem_kd.errors import UserError
from fairchem_kd.losses import Labels, LossInputs, loss_class
from fairchem_kd.stock.positions import followed

ATOMS = sum(NATOMS)
SYSTEMS = [0, 0, 0, 1, 2, 2, 2, 2]
STEP = 1e-5  # Å


def loss(**options: Any) -> Any:
    return loss_class("antisymmetric", WHERE).from_options(options, WHERE)


def no_potential(pos: Tensor, weight: Tensor) -> Tensor:
    """Forces that are no slope, in which the atoms of a structure feel each other."""
    of = torch.tensor(SYSTEMS)
    mean = torch.zeros(3, 3, dtype=pos.dtype).index_add(0, of, pos)[of]
    return torch.sin((pos + mean) @ weight) * pos.square().sum(1, keepdim=True)


def of_potential(pos: Tensor, weight: Tensor) -> Tensor:
    """Minus the slope of an energy."""
    of = torch.tensor(SYSTEMS)
    mean = torch.zeros(3, 3, dtype=pos.dtype).index_add(0, of, pos)[of]
    energy = (torch.sin((pos + mean) @ weight) * pos.square()).sum()
    return -torch.autograd.grad(energy, pos, create_graph=True)[0]


def inputs_of(forces: Any, weight: Tensor, mask: list[bool] | None = None) -> LossInputs:
    pos = random(ATOMS, 3, seed=5).requires_grad_(True)
    batch = SimpleNamespace(
        natoms=torch.tensor(NATOMS), fixed=1 - torch.tensor(FREE), batch=torch.tensor(SYSTEMS),
        pos=pos,
    )  # fmt: skip
    systems = None if mask is None else torch.tensor(mask)
    return LossInputs(
        batch, student_outputs={"forces": forces(pos, weight)}, step=3, systems=systems
    )


def jacobian(weight: Tensor, pos: Tensor) -> list[list[float]]:
    """``(3N, 3N)`` by central differences, component by component."""
    rows: list[list[float]] = [[0.0] * (3 * ATOMS) for _ in range(3 * ATOMS)]
    for moved in range(3 * ATOMS):
        ends = []
        for sign in (1, -1):
            other = pos.detach().clone().reshape(-1)
            other[moved] += sign * STEP
            ends.append(no_potential(other.view(-1, 3), weight).reshape(-1).tolist())
        for component in range(3 * ATOMS):
            rows[component][moved] = (ends[0][component] - ends[1][component]) / (2 * STEP)
    return rows


@pytest.mark.parametrize("fn", ["mse", "mae", "huber"])
@pytest.mark.parametrize(
    ("atoms", "mask"), [("free", None), ("all", None), ("free", [True, True, False])]
)
def test_values_are_those_of_a_loop(fn: str, atoms: str, mask: list[bool] | None) -> None:
    weight = random(3, 3, seed=1)
    term, inputs = loss(fn=fn, probes=3, atoms=atoms), inputs_of(no_potential, weight, mask)
    rows = jacobian(weight, inputs.batch.pos)
    probes = [one.tolist() for one in term.directions(inputs)]
    expected = []
    for system in range(3):
        members = [a for a in range(ATOMS) if SYSTEMS[a] == system]
        moving = [a for a in members if atoms == "all" or FREE[a]]
        if not moving or (mask is not None and not mask[system]):
            continue
        for first, second in ((0, 1), (0, 2), (1, 2)):
            total = 0.0
            for a in moving:
                for b in moving:
                    for k in range(3):
                        for m in range(3):
                            slope = rows[3 * a + k][3 * b + m]
                            u, v = probes[first], probes[second]
                            total += u[a][k] * slope * v[b][m] - v[a][k] * slope * u[b][m]
            expected.append(compare(fn, total / (3 * len(moving)) ** 0.5))
    assert value(term(inputs)) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert value(term(inputs)) > 1e-3


def test_it_is_the_squared_length_of_a_row_on_average() -> None:
    """Of ``J - J^T`` on the free atoms, over many draws."""
    weight = random(3, 3, seed=1)
    inputs = inputs_of(no_potential, weight, [False, False, True])
    rows = torch.tensor(jacobian(weight, inputs.batch.pos)).view(ATOMS, 3, ATOMS, 3)
    free = [a for a in range(ATOMS) if SYSTEMS[a] == 2 and FREE[a]]
    own = rows[free][:, :, free].reshape(3 * len(free), -1)
    expected = float((own - own.T).square().sum(1).mean())
    drawn = []
    for seed in range(150):
        drawn.append(value(loss(probes=8, seed=seed)(inputs)))
    assert sum(drawn) / len(drawn) == pytest.approx(expected, rel=0.1)


def test_of_a_potential_it_is_nothing() -> None:
    assert value(loss(atoms="all")(inputs_of(of_potential, random(3, 3, seed=1)))) < 1e-20


def test_the_gradient_reaches_the_weights() -> None:
    weight = random(3, 3, seed=1).requires_grad_(True)
    (part,) = loss()(inputs_of(no_potential, weight))
    (part.total / part.count).backward()
    for place in ((0, 0), (2, 1)):
        ends = []
        for sign in (1, -1):
            moved = weight.detach().clone()
            moved[place] += sign * STEP
            ends.append(value(loss()(inputs_of(no_potential, moved))))
        assert weight.grad is not None
        assert float(weight.grad[place]) == pytest.approx(
            (ends[0] - ends[1]) / (2 * STEP), rel=1e-4
        )


def test_directions_are_of_the_structure_and_the_step() -> None:
    """Whatever the order of a batch's atoms; fixed ones do not move."""
    inputs, term = inputs_of(no_potential, random(3, 3)), loss(probes=8)
    whole = torch.stack(term.directions(inputs))
    assert whole.shape == (8, ATOMS, 3)
    free = torch.tensor(FREE) == 1
    assert bool((whole[:, free].abs() == 1).all())
    assert not whole[:, ~free].any()
    order = [2, 1, 0, 3, 5, 7, 4, 6]
    batch = inputs.batch
    turned = SimpleNamespace(
        natoms=batch.natoms,
        fixed=batch.fixed[order],
        batch=batch.batch[order],
        pos=batch.pos[order],
    )
    found = torch.stack(term.directions(LossInputs(turned, step=3)))
    assert torch.equal(found, whole[:, order])
    draws = torch.stack(
        [torch.stack(term.directions(LossInputs(batch, step=s))) for s in range(60)]
    )
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 60
    assert draws[:, :, free].mean().abs() < 0.03  # neither sign, nor pair of probes, is preferred
    assert (draws[:, 0] * draws[:, 1])[:, free].mean().abs() < 0.1


def test_a_turned_structure_with_turned_probes_has_the_same_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a real PaiNN: rotation, reflection, translation."""
    with models.default_dtype(torch.float64):
        model = models.small_model("painn", dtype=torch.float64, use_pbc=False).eval()
        data = models.batch(models.structures(2), dtype=torch.float64)
        probes = [random(*data.pos.shape, seed=s) for s in (1, 2)]
        turn, _ = torch.linalg.qr(random(3, 3, seed=4))
        mirror = turn @ torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
        found = []
        for matrix, shift in ((torch.eye(3), 0.0), (turn, 0.3), (mirror, -0.2)):
            matrix = matrix.double()
            made, term = data.clone(), loss(atoms="all")
            made.pos = (data.pos @ matrix.T + shift).requires_grad_(True)
            monkeypatch.setattr(
                term, "directions", lambda _, m=matrix: [one @ m.T for one in probes]
            )
            with followed(model):
                outputs = {"forces": model(made)["forces"]}
            found.append(value(term(LossInputs(made, student_outputs=outputs))))
        assert found[0] > 1e-4
        assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


def test_in_an_evaluation_it_says_nothing() -> None:
    inputs = inputs_of(no_potential, random(3, 3, seed=1))
    inputs.student_outputs = {"forces": inputs.student_outputs["forces"].detach()}
    assert loss()(inputs) == []
    inputs = inputs_of(no_potential, random(3, 3, seed=1))
    inputs.batch.fixed = torch.ones(ATOMS)
    (part,) = loss()(inputs)
    assert (float(part.total.detach()), int(part.count)) == (0.0, 0)


def test_steps_on_it_lessen_it() -> None:
    """And it needs nothing of the teacher, whatever that is."""
    model = models.small_model("painn", seed=1)
    distiller = Distiller(model, models.small_model("escn", seed=2), {"antisymmetric": {}})
    batch = models.batch(models.structures(2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    values = []
    for _ in range(12):
        own = batch.clone()
        with distiller.watch(own):
            model(own)
        found = distiller.loss()
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        values.append(float(found.detach()))
    assert sum(values[-3:]) < 0.5 * sum(values[:3])


def test_a_student_whose_forces_are_a_slope_is_refused() -> None:
    for student in ("schnet", "gemnet_oc_gradient"):
        with pytest.raises(UserError, match="the student's are a slope: take it out"):
            Distiller(
                models.small_model(student), models.small_model("painn"), {"antisymmetric": {}}
            )


def test_a_student_without_forces_is_refused() -> None:
    with pytest.raises(UserError, match="outputs has no 'forces'"):
        loss().compared_outputs(Labels(label_losses(), {"energy": {}}, None))
    assert loss().compared_outputs(Labels(label_losses(), {"forces": {}}, {"energy": "s"})) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": 1}, "probes must be at least 2"),
        ({"probes": 9}, "probes must be at most 8"),
        ({"probes": True}, "probes must be a whole number"),
        ({"probes": "nan"}, "probes must be a whole number"),
        ({"atoms": None}, "atoms"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"fn": "l2"}, "fn cannot be"),
        ({"coefficient": float("nan")}, "coefficient must be"),
        ({"probe": 2}, "did you mean 'probes'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        loss(**options)
