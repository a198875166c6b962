"""relational: InfoNCE against loops, its draws, and one rank against two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import ATOMS, EDGES, STUDENT, TEACHER, compared, counting, fitted, pair_inputs, pair_loss
from terms import mean, random, value
from trainings import start_ranks

from fairchem_kd.features import GRAPH
from fairchem_kd.losses import LossInputs
from fairchem_kd.losses.relational import neighbours

MASK = [True, False, True]


def unit(v: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


def pairs_of(counts: list[bool]) -> list[tuple[int, int]]:
    """Each direction of a pair once, and no atom with itself."""
    return sorted({(s, t) for s, t, *_ in EDGES if s != t and counts[s] and counts[t]})


@pytest.mark.parametrize("edges", ["student", "teacher"])
@pytest.mark.parametrize(("atoms", "mask"), [("all", None), ("free", None), ("all", MASK)])
@pytest.mark.parametrize("temperature", [0.15, 2.0])
def test_relational_equals_loops(
    edges: str, atoms: str, mask: list[bool] | None, temperature: float
) -> None:
    term = pair_loss("relational", edges=edges, atoms=atoms, temperature=temperature)
    inputs = pair_inputs(term, mask=mask)
    fitted(term, inputs)
    student, teacher = compared(term, inputs)
    pairs = pairs_of(counting(atoms, mask))
    ours, theirs = (
        [[a - b for a, b in zip(rows[i], rows[j], strict=True)] for i, j in pairs]
        for rows in (student, teacher)
    )
    total = 0.0
    for p, one in enumerate(ours):
        scores = [cosine(one, other) / temperature for other in theirs]
        total -= scores[p] - math.log(sum(map(math.exp, scores)))
    (part,) = term(inputs)
    assert part.count == 1
    assert value([part]) == pytest.approx(total / len(pairs), rel=1e-8)


def test_pairs_are_those_of_different_atoms_once() -> None:
    found = neighbours(torch.tensor(EDGES), None)
    assert sorted(map(tuple, found.tolist())) == pairs_of([True] * ATOMS)
    assert torch.equal(found[:, 1], found[:, 1].sort().values)


def test_draws_follow_from_seed_and_step_alone() -> None:
    def drawn(step: int, **options: Any) -> float:
        term = pair_loss("relational", pairs=4, standardize=False, **options)
        inputs = pair_inputs(term)
        inputs.step = step
        return value(term(inputs))

    state = torch.get_rng_state()
    values = [drawn(step) for step in range(1, 9)]
    assert values == [drawn(step) for step in range(1, 9)]
    assert len(set(values)) > 4
    assert [drawn(step, seed=1) for step in range(1, 9)] != values
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_pairs_than_asked_for_are_compared() -> None:
    term = pair_loss("relational", pairs=4, standardize=False)
    inputs = pair_inputs(term)
    student = inputs.student[term.student_request].requires_grad_()
    value_ = mean(term(inputs))
    assert float(value_.detach()) < 2 * 2 / 0.15 + math.log(4)
    value_.backward()
    assert int((student.grad.abs().sum(1) > 0).sum()) <= 8
    seen = []
    for step in range(1, 60):
        chosen = term._chosen(neighbours(torch.tensor(EDGES), None), inputs.batch.pos, step)
        assert len(chosen) == 4
        seen += map(tuple, chosen.tolist())
    everyone = pairs_of([True] * ATOMS)
    for pair in everyone:  # each as often as the others: 20 times of 59, give or take 3.6
        assert 7 < seen.count(pair) < 36


def test_equal_features_have_finite_gradients() -> None:
    term = pair_loss("relational", standardize=False)
    inputs = pair_inputs(term)
    student = torch.ones(ATOMS, STUDENT).double().requires_grad_()
    inputs.student[term.student_request] = student
    loss = mean(term(inputs))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(len(pairs_of([True] * ATOMS))))
    assert student.grad.isfinite().all()


# -- one rank and two -----------------------------------------------------------------------------


def part_of(term: Any, whole: LossInputs, systems: list[int]) -> LossInputs:
    """The inputs of some of the structures, as their own rank has them."""
    batch = whole.batch
    atoms = torch.isin(batch.batch, torch.tensor(systems))
    number = atoms.cumsum(0) - 1
    own = type(batch)(
        natoms=batch.natoms[systems],
        fixed=batch.fixed[atoms],
        batch=batch.batch[atoms] - min(systems, default=0),
        atomic_numbers=batch.atomic_numbers[atoms],
        pos=batch.pos[atoms],
    )
    inputs = LossInputs(own, step=whole.step)
    for side, mine in (("student", inputs.student), ("teacher", inputs.teacher)):
        for request, values in getattr(whole, side).items():
            if request == GRAPH:
                values = values[atoms[values[:, 1]]].clone()
                values[:, :2] = number[values[:, :2]]
                mine[request] = values  # type: ignore[index]
            else:
                mine[request] = values[atoms]  # type: ignore[index]
    return inputs


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cka": ("cka", {"atoms": "free"}),
    "relational": ("relational", {"standardize": False}),
    "drawn": ("relational", {"standardize": False, "pairs": 5}),
}


def case(name: str) -> tuple[Any, LossInputs, torch.Tensor]:
    kind, options = CASES[name]
    term = pair_loss(kind, **options)
    inputs = pair_inputs(term)
    weight = random(STUDENT, STUDENT, seed=7).requires_grad_()
    request = term.student_request
    inputs.student[request] = inputs.student[request] @ weight  # type: ignore[index]
    return term, inputs, weight


def rank_main(rank: int, world: int, root: Path) -> None:
    for name in CASES:
        for cut, systems in enumerate(([[0, 1], [2]], [[0, 1, 2], []])):
            term, inputs, weight = case(name)
            (part,) = term(part_of(term, inputs, systems[rank]))
            sums = torch.stack([part.total.detach(), torch.tensor(float(part.count)).double()])
            dist.all_reduce(sums)
            (part.total * world / sums[1]).backward()
            grads = weight.grad
            dist.all_reduce(grads)
            torch.save((sums[0] / sums[1], grads / world), root / f"{name}-{cut}-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    start_ranks(rank_main, 2, root)
    return root


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [0, 1])
def test_two_ranks_have_the_loss_and_gradient_of_one(ranks: Path, name: str, cut: int) -> None:
    term, inputs, weight = case(name)
    loss = mean(term(inputs))
    loss.backward()
    assert TEACHER > STUDENT
    for rank in range(2):
        theirs, gradient = torch.load(ranks / f"{name}-{cut}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)
