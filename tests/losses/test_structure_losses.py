"""cka, gsp and lsp against loops in float64, their limits, and what they do not change with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pairs import ATOMS, EDGES, SYSTEMS, compared, counting, fitted, pair_inputs, pair_loss
from terms import compare, mean, random, value

from fairchem_kd.errors import UserError
from fairchem_kd.features import GRAPH, Request
from fairchem_kd.losses.hsic import cka

MASK = [True, False, True]


def hsic(x: list[list[float]], y: list[list[float]]) -> float:
    """Song et al. 2012, equation 5, with its matrices written out."""
    n = len(x)
    k = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    l = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in y] for p in y]  # noqa: E741
    for i in range(n):
        k[i][i] = l[i][i] = 0.0
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    both = sum(map(sum, k)) * sum(map(sum, l)) / ((n - 1) * (n - 2))
    mixed = sum(sum(k[i]) * sum(l[i]) for i in range(n))
    return (trace + both - 2 * mixed / (n - 2)) / (n * (n - 3))


@pytest.mark.parametrize("atoms", ["all", "free"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_cka_equals_loops(atoms: str, mask: list[bool] | None) -> None:
    term = pair_loss("cka", atoms=atoms)
    inputs = pair_inputs(term, mask=mask)
    rows = [i for i, counts in enumerate(counting(atoms, mask)) if counts]
    x, y = ([side[i] for i in rows] for side in compared(term, inputs))
    expected = 1 - hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    (part,) = term(inputs)
    assert part.count == 1
    assert value([part]) == pytest.approx(expected, rel=1e-9)


def test_cka_is_unbiased_and_knows_no_rotation_scale_or_shift() -> None:
    values = [float(cka(random(12, 30, seed=s), random(12, 30, seed=s + 500))) for s in range(200)]
    assert abs(sum(values) / 200) < 0.02  # the plain estimator gives 0.7 here
    x = random(20, 6)
    turn, _ = torch.linalg.qr(random(6, 6, seed=1))
    assert float(cka(x, 3 * x @ turn + 5)) == pytest.approx(1.0, abs=1e-9)


def test_cka_teaches_the_student_alone() -> None:
    term = pair_loss("cka")
    inputs = pair_inputs(term)
    student = inputs.student[term.student_request].requires_grad_()
    teacher = inputs.teacher[term.teacher_request].requires_grad_()
    optimizer = torch.optim.Adam([student], 0.05)
    before = value(term(inputs))
    for _ in range(60):
        optimizer.zero_grad()
        mean(term(inputs)).backward()
        optimizer.step()
    assert value(term(inputs)) < 0.5 * before
    assert teacher.grad is None
    assert not term.needs_statistics
    assert not list(term.parameters())


@pytest.mark.parametrize("case", ["three atoms", "a constant student", "a constant teacher"])
def test_cka_of_what_does_not_vary_teaches_nothing(case: str) -> None:
    term = pair_loss("cka")
    inputs = pair_inputs(term, mask=[True, False, False] if case == "three atoms" else None)
    if "student" in case:
        inputs.student[term.student_request] = torch.full((ATOMS, 5), 0.1)  # float32 rounds it
    if "constant teacher" in case:
        inputs.teacher[term.teacher_request] = torch.full((ATOMS, 7), 0.1)
    student = inputs.student[term.student_request].requires_grad_()
    (part,) = term(inputs)
    assert float(part.total.detach()) == part.count == 0
    part.total.backward()
    assert not student.grad.any()


def distances(rows: list[Any], width: int) -> list[list[float]]:
    return [
        [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / width for q in rows] for p in rows
    ]


@pytest.mark.parametrize("fn", ["mse", "mae", "huber"])
@pytest.mark.parametrize(("atoms", "mask"), [("all", None), ("free", MASK)])
@pytest.mark.parametrize("projection", ["none", "linear"])
@pytest.mark.parametrize("standardize", [True, False])
def test_gsp_equals_loops(
    fn: str, atoms: str, mask: list[bool] | None, projection: str, standardize: bool
) -> None:
    term = pair_loss("gsp", fn=fn, atoms=atoms, projection=projection, standardize=standardize)
    inputs = pair_inputs(term, mask=mask)
    fitted(term, inputs)
    counts = counting(atoms, mask)
    student, teacher = compared(term, inputs)
    ours, theirs = distances(student, len(student[0])), distances(teacher, 7)
    values = [
        compare(fn, ours[i][j] - theirs[i][j])
        for i in range(ATOMS)
        for j in range(ATOMS)
        if i != j and SYSTEMS[i] == SYSTEMS[j] and counts[i] and counts[j]
    ]
    (part,) = term(inputs)
    assert int(part.count) == len(values) > 0
    assert value([part]) == pytest.approx(sum(values) / len(values), rel=1e-9)


@pytest.mark.parametrize("edges", ["student", "teacher"])
@pytest.mark.parametrize(("atoms", "mask"), [("all", None), ("free", MASK)])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_lsp_equals_loops(
    edges: str, atoms: str, mask: list[bool] | None, temperature: float
) -> None:
    term = pair_loss("lsp", edges=edges, atoms=atoms, temperature=temperature)
    inputs = pair_inputs(term, mask=mask)
    fitted(term, inputs)
    counts = counting(atoms, mask)
    student, teacher = compared(term, inputs)
    total, number = 0.0, 0
    for i in range(ATOMS):
        into = [source for source, target, *_ in EDGES if target == i]
        if not into or not counts[i]:
            continue
        shares = []
        for rows, width in ((student, len(student[0])), (teacher, 7)):
            d = distances(rows, width)
            weights = [math.exp(math.sqrt(d[i][j]) / temperature) for j in into]
            shares.append([w / sum(weights) for w in weights])
        total += sum(t * math.log(t / s) for s, t in zip(*shares, strict=True))
        number += 1
    (part,) = term(inputs)
    assert int(part.count) == number > 0
    assert value([part]) == pytest.approx(total / number, rel=1e-8)


def test_edges_are_asked_of_the_side_that_has_to_have_them() -> None:
    node = Request("node", "node")
    for edges, ours, theirs in (("student", 2, 1), ("teacher", 1, 2)):
        term = pair_loss("lsp", edges=edges)
        assert term.student_requests() == [node, GRAPH][:ours]
        assert term.teacher_requests() == [node, GRAPH][:theirs]


@pytest.mark.parametrize("kind", ["gsp", "lsp"])
def test_structure_is_kept_under_shifts_and_rotations_of_features(kind: str) -> None:
    term = pair_loss(kind, standardize=False)
    inputs = pair_inputs(term)
    turn, _ = torch.linalg.qr(random(5, 5, seed=3))
    before = value(term(inputs))
    student = inputs.student[term.student_request]
    inputs.student[term.student_request] = student @ turn + 7
    assert value(term(inputs)) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("kind", ["gsp", "lsp"])
def test_gradients_are_finite_where_features_are_equal_or_far_apart(kind: str) -> None:
    """Norms of 0 (images of one atom, equal atoms), and exponents beyond what float32 holds."""
    term = pair_loss(kind, standardize=False).float()
    inputs = pair_inputs(term)
    features = inputs.student[term.student_request].float()
    teacher = 1e4 * inputs.teacher[term.teacher_request].float()
    for scale in (0.0, 1.0, 1e4):
        student = scale * features
        student[1] = student[0]
        student.requires_grad_()
        inputs.student[term.student_request] = student
        inputs.teacher[term.teacher_request] = teacher
        loss = mean(term(inputs))
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cka", "gsp", "lsp", "relational"])
def test_no_atoms_and_no_edges_give_empty_sums(kind: str) -> None:
    term = pair_loss(kind) if kind == "cka" else pair_loss(kind, standardize=False)
    inputs = pair_inputs(term)
    if GRAPH in inputs.student:
        inputs.student[GRAPH] = torch.zeros(0, 5, dtype=torch.long)
    else:
        batch = inputs.batch
        batch.natoms, batch.batch, batch.fixed = batch.natoms[:0], batch.batch[:0], batch.fixed[:0]
        for side, request in (
            (inputs.student, term.student_request),
            (inputs.teacher, term.teacher_request),
        ):
            side[request] = side[request][:0]
    student = inputs.student[term.student_request].requires_grad_()
    (part,) = term(inputs)
    assert float(part.total.detach()) == float(part.count) == 0
    part.total.backward()
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cka", {"fn": "mse"}, "unknown key 'fn'"),
        ("cka", {"projection": "linear"}, "unknown key 'projection'"),
        ("gsp", {"fn": "kl"}, "term.fn cannot be 'kl'"),
        ("gsp", {"atoms": None}, "term.atoms"),
        ("lsp", {"fn": "mse"}, "unknown key 'fn'"),
        ("lsp", {"edges": "both"}, "term.edges cannot be 'both'"),
        ("lsp", {"temperature": 0}, "term.temperature must be greater than 0"),
        ("lsp", {"temperature": "nan"}, "term.temperature"),
        ("relational", {"pairs": 1}, "term.pairs must be at least 2"),
        ("relational", {"pairs": 1e9}, "term.pairs must be at most 16384"),
        ("relational", {"pairs": True}, "term.pairs"),
        ("relational", {"temperature": -0.1}, "term.temperature must be greater than 0"),
        ("v2v_geometric", {"angle": 1.5}, "term.angle must be at most 1"),
        ("n2n_by_head", {"epsilon": -1}, "term.epsilon must be at least 0"),
        ("e2e", {"min_matched": 2}, "term.min_matched must be at most 1"),
        ("e2e", {"min_matched": "null"}, "term.min_matched"),
    ],
)
def test_options_that_do_not_fit(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair_loss(kind, **options)
