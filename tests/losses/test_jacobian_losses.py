"""Losses on how forces change: against finite differences in float64, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from terms import FREE, NATOMS, WHERE, label_losses, random, value

from fairchem_kd.errors import UserError
from fairchem_kd.losses import Labels, LossInputs, loss_class, pair_atoms

ATOMS = sum(NATOMS)
SYSTEMS = [0, 0, 0, 1, 2, 2, 2, 2]
STEP = 1e-5  # Å


def loss(kind: str, **options: Any) -> Any:
    return loss_class(kind, WHERE).from_options(options, WHERE)


def some_batch(pos: torch.Tensor, order: list[int] | None = None) -> Any:
    order = list(range(ATOMS)) if order is None else order
    fixed = 1 - torch.tensor(FREE)[order]
    of = torch.tensor(SYSTEMS)[order]
    return SimpleNamespace(natoms=torch.tensor(NATOMS), fixed=fixed, batch=of, pos=pos[order])


def forces(pos: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Forces of no potential, in which the atoms of a structure feel each other."""
    of = torch.tensor(SYSTEMS)
    mean = torch.zeros(3, 3, dtype=pos.dtype).index_add(0, of, pos)[of]
    return torch.sin((pos + mean) @ weight) * pos.square().sum(1, keepdim=True)


def slope(which: int, axis: int, pos: torch.Tensor, weight: torch.Tensor) -> list[list[float]]:
    """Row (which, axis) of the Jacobian, ``(N, 3)``, by finite differences in a loop."""
    row = []
    for atom in range(ATOMS):
        row.append([])
        for component in range(3):
            ends = []
            for sign in (1, -1):
                moved = pos.detach().clone()
                moved[atom, component] += sign * STEP
                ends.append(float(forces(moved, weight)[which, axis]))
            row[-1].append((ends[0] - ends[1]) / (2 * STEP))
    return row


def inputs_of(ours: torch.Tensor, theirs: torch.Tensor, mask: list[bool] | None = None) -> Any:
    """Student and teacher as functions of positions, by their weights ``(3, 3)``."""
    pos = random(ATOMS, 3, seed=5).requires_grad_(True)
    batch = some_batch(pos)
    batch.pos = pos

    def slopes(cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for cotangent in cotangents:
            total = torch.zeros(ATOMS, 3, dtype=torch.float64)
            for atom, axis in cotangent.nonzero().tolist():
                total += torch.tensor(slope(atom, axis, pos, theirs), dtype=torch.float64)
            found.append(total)
        return found

    return LossInputs(
        batch, student_outputs={"forces": forces(pos, ours)}, step=3,
        systems=None if mask is None else torch.tensor(mask), teacher_slopes=slopes,
    )  # fmt: skip


@pytest.mark.parametrize("atoms", ["free", "all"])
@pytest.mark.parametrize("mask", [None, [True, True, False]])
def test_rows_are_those_of_finite_differences(atoms: str, mask: list[bool] | None) -> None:
    ours, theirs = random(3, 3, seed=1), random(3, 3, seed=2)
    term = loss("jacobian", rows=2, atoms=atoms)
    inputs = inputs_of(ours, theirs, mask)
    expected: list[float] = []
    for row in range(2):
        cotangent = term._cotangent(inputs, row)
        drawn = cotangent.nonzero().tolist()
        assert [SYSTEMS[atom] for atom, _ in drawn] == [0, 1, 2]  # one of each structure
        assert atoms == "all" or all(FREE[atom] for atom, _ in drawn)
        total = torch.zeros(ATOMS, 3, dtype=torch.float64)
        for atom, axis in drawn:
            for sign, weight in ((1, ours), (-1, theirs)):
                total += sign * torch.tensor(slope(atom, axis, inputs.batch.pos, weight))
        for atom in range(ATOMS):
            if (atoms == "all" or FREE[atom]) and (mask is None or mask[SYSTEMS[atom]]):
                expected += [float(x) ** 2 for x in total[atom]]
    assert value(term(inputs)) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_gradient_reaches_the_student() -> None:
    """Of its weights, compared with finite differences of the loss."""
    term = loss("jacobian")
    ours, theirs = random(3, 3, seed=1).requires_grad_(True), random(3, 3, seed=2)
    (part,) = term(inputs_of(ours, theirs))
    (part.total / part.count).backward()
    for place in ((0, 0), (2, 1)):
        ends = []
        for sign in (1, -1):
            moved = ours.detach().clone()
            moved[place] += sign * STEP
            ends.append(value(term(inputs_of(moved, theirs))))
        assert ours.grad is not None
        assert float(ours.grad[place]) == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-3)


def test_what_is_drawn_is_of_the_structure_and_the_step() -> None:
    """Whatever shares the batch, in whatever order its atoms come."""
    term = loss("jacobian")
    pos = random(ATOMS, 3, seed=5)
    batch = some_batch(pos)
    whole = term._cotangent(LossInputs(batch, step=3), 0)
    turned = [2, 1, 0, 3, 5, 7, 4, 6]
    other = term._cotangent(LossInputs(some_batch(pos, turned), step=3), 0)
    assert torch.equal(other, whole[turned])
    alone = SimpleNamespace(
        natoms=torch.tensor([4]), fixed=batch.fixed[4:], batch=torch.zeros(4, dtype=torch.long),
        pos=pos[4:],
    )  # fmt: skip
    assert torch.equal(term._cotangent(LossInputs(alone, step=3), 0), whole[4:])
    steps = {tuple(term._cotangent(LossInputs(batch, step=s), 0).nonzero().flatten().tolist())
             for s in range(20)}  # fmt: skip
    assert len(steps) > 10
    alone.fixed = torch.ones(4)
    assert not bool(term._cotangent(LossInputs(alone, step=3), 0).any())


def test_rows_that_are_not_finite_and_evaluation_teach_nothing() -> None:
    term = loss("jacobian", atoms="all")
    inputs = inputs_of(random(3, 3, seed=1), random(3, 3, seed=2))
    inputs.teacher_slopes = lambda cots: [torch.full((ATOMS, 3), torch.nan) for _ in cots]
    (part,) = term(inputs)
    assert int(part.count) == 0
    assert float(part.total.detach()) == 0
    with torch.no_grad():
        inputs.student_outputs = {"forces": random(ATOMS, 3)}
    assert term(inputs) == []


@pytest.mark.parametrize("fn", ["mse", "mae", "huber"])
def test_antithetic_differences_are_those_of_a_loop(fn: str) -> None:
    from terms import compare

    natoms = torch.tensor([2, 2, 3, 2, 3])  # pairs (0, 3) and (2, 4)
    pos = random(12, 3, seed=3)
    pos[7:9] = pos[0:2] + 0.1
    pos[9:12] = pos[4:7] - 0.2 * random(3, 3, seed=4)
    fixed = torch.tensor([0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1])
    for first, second in ((1, 8), (6, 11)):  # fixed atoms stay
        pos[second] = pos[first]
    pairs = pair_atoms(natoms, torch.tensor([[0, 3], [2, 4]]))
    assert pairs.tolist() == [[0, 7, 0], [1, 8, 0], [4, 9, 1], [5, 10, 1], [6, 11, 1]]
    of = torch.repeat_interleave(torch.arange(5), natoms)
    batch = SimpleNamespace(natoms=natoms, fixed=fixed, batch=of, pos=pos, pairs=pairs)
    ours, theirs = random(12, 3, seed=6), random(12, 3, seed=7)
    inputs = LossInputs(batch, student_outputs={"forces": ours}, teacher_outputs={"forces": theirs})
    expected = []
    for start, other, size in ((0, 7, 2), (4, 9, 3)):
        free = [i for i in range(size) if not fixed[start + i]]
        square = sum(float((pos[start + i] - pos[other + i]).square().sum()) / 4 for i in free)
        h = (square / (3 * len(free))) ** 0.5
        for i in free:
            apart = []
            for k in range(3):
                change = [
                    float(f[start + i, k] - f[other + i, k]) / (2 * h) for f in (ours, theirs)
                ]
                apart.append(change[0] - change[1])
            if fn != "mse":  # of the length
                apart = [sum(d * d for d in apart) ** 0.5]
            expected += [compare(fn, d) for d in apart]
    got = value(loss("jacobian_antithetic", fn=fn)(inputs))
    assert got == pytest.approx(sum(expected) / len(expected))
    inputs.systems = torch.tensor([True, True, True, True, False])  # one of a pair: neither counts
    (part,) = loss("jacobian_antithetic", fn=fn)(inputs)
    assert int(part.count) == (3 if fn == "mse" else 1)
    batch.pairs = None
    assert loss("jacobian_antithetic", fn=fn)(inputs) == []


def test_along_a_direction_the_antithetic_form_is_the_jacobian() -> None:
    """Of a smooth function, up to the square of h."""
    pos, along = random(ATOMS, 3, seed=5), random(ATOMS, 3, seed=8)
    along = along / along.square().mean().sqrt()
    ours = random(3, 3, seed=1)
    exact = torch.func.jvp(lambda x: forces(x, ours), (pos,), (along,))[1]
    h = 1e-4
    both = torch.cat([pos + h * along, pos - h * along])
    ends = torch.cat([forces(pos + h * along, ours), forces(pos - h * along, ours)])
    natoms = torch.tensor([ATOMS, ATOMS])
    batch = SimpleNamespace(
        natoms=natoms, fixed=torch.zeros(2 * ATOMS), pos=both,
        batch=torch.repeat_interleave(torch.arange(2), natoms),
        pairs=pair_atoms(natoms, torch.tensor([[0, 1]])),
    )  # fmt: skip
    inputs = LossInputs(
        batch, student_outputs={"forces": ends}, teacher_outputs={"forces": torch.zeros_like(ends)}
    )
    got = value(loss("jacobian_antithetic")(inputs))
    assert got == pytest.approx(float(exact.square().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["jacobian", "jacobian_antithetic"])
def test_outputs_without_forces_are_refused(kind: str) -> None:
    for outputs, taught in (({"energy": {}}, None), ({"forces": {}}, {"energy": "system"})):
        labels = Labels(label_losses(), outputs, taught)
        with pytest.raises(UserError, match="has no 'forces'"):
            loss(kind).compared_outputs(labels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": 1.5}, "rows must be a whole number"),
        ({"rows": True}, "rows must be a whole number"),
        ({"atoms": "none"}, "atoms cannot be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"fn": "l2"}, "fn cannot be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        loss("jacobian", **options)
