"""The losses of features against loops in float64, and on models."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from models import batch as models_batch
from models import model_config, small_model
from terms import (
    FREE,
    STUDENT,
    TEACHER,
    WHERE,
    compare,
    feature_inputs,
    feature_loss,
    generator,
    mean,
    random,
    standardised,
    value,
)

from fairchem_kd.features import FeatureExtractor, FeatureSpec
from fairchem_kd.losses import LossInputs, loss_class
from fairchem_kd.losses.elementwise import vectorwise


@pytest.mark.parametrize(
    ("kind", "fn", "standardize", "atoms", "name"),
    list(
        itertools.product(
            ["n2n", "e2n", "v2v"],
            ["mse", "mae", "huber"],
            [True, False],
            ["all", "free"],
            ["linear", "mlp", "identity"],
        )
    ),
)
def test_features_equal_loops(kind, fn, standardize, atoms, name):
    channels = TEACHER if name == "identity" else STUDENT
    term = feature_loss(
        kind, channels, fn=fn, standardize=standardize, atoms=atoms, projection=name, delta=0.7
    )
    inputs, student, teacher = feature_inputs(term, channels)
    rows = [i for i, free in enumerate(FREE) if free or atoms == "all"]
    assert term.needs_statistics is standardize
    term.update_statistics(inputs.teacher, inputs.batch)
    term.finalize_statistics()
    if standardize:
        teacher = standardised(teacher, rows)
    with torch.no_grad():
        projected = term.projection(student)
    values = [compare(fn, d, 0.7) for i in rows for d in apart(projected[i], teacher[i], kind, fn)]
    (part,) = term(inputs)
    assert part.name == ""
    assert part.weight == 1.0
    assert int(part.count) == len(values)
    # the standardizer's shift and scale are rounded to fp32
    assert float(part.total.detach()) == pytest.approx(
        sum(values), rel=1e-5 if standardize else 1e-12
    )


def apart(student, teacher, kind, fn):
    """What ``fn`` is of, for one atom: differences, and of vectors (3, C) their lengths."""
    if kind != "v2v" or fn == "mse":
        return [float(d) for d in (student - teacher).flatten()]
    return [
        sum(float(student[k, c] - teacher[k, c]) ** 2 for k in range(3)) ** 0.5
        for c in range(student.shape[1])
    ]


def test_linear_n2n_written_out():
    term = feature_loss("n2n", standardize=False)
    inputs, student, teacher = feature_inputs(term)
    weight, bias = term.projection.weight.detach(), term.projection.bias.detach()
    total = 0.0
    for i, d in itertools.product(range(8), range(TEACHER)):
        m = sum(float(weight[d, h] * student[i, h]) for h in range(STUDENT))
        total += (m + float(bias[d]) - float(teacher[i, d])) ** 2
    assert value(term(inputs)) == pytest.approx(total / (8 * TEACHER), rel=1e-12)


@pytest.mark.parametrize("fn", ["mae", "huber"])
def test_equal_vectors_have_no_gradient_rather_than_nan(fn):
    same = random(4, 3, 2, seed=3).requires_grad_()
    vectorwise(fn, same, same.detach(), 0.5).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(same))
    with pytest.raises(ValueError, match="differ in shape"):
        vectorwise(fn, same, same[:, :1])


@pytest.mark.parametrize("kind", ["n2n", "e2n", "v2v"])
def test_gradients_reach_student_and_projection_but_not_the_teacher(kind):
    term = feature_loss(kind)
    inputs, student, teacher = feature_inputs(term)
    student.requires_grad_()
    teacher.requires_grad_()
    term.update_statistics(inputs.teacher, inputs.batch)
    term.finalize_statistics()
    mean(term(inputs)).backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad is None
    assert all(p.grad is not None for p in term.projection.parameters())


@pytest.mark.parametrize("fn", ["mse", "mae", "huber"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("reflect", [False, True])
def test_v2v_is_invariant(projection, reflect, fn):
    term = feature_loss("v2v", projection=projection, fn=fn, delta=0.3)
    inputs, student, teacher = feature_inputs(term)
    term.update_statistics(inputs.teacher, inputs.batch)
    term.finalize_statistics()
    turn, _ = torch.linalg.qr(random(3, 3, seed=9))
    if (torch.linalg.det(turn) < 0) != reflect:
        turn = -turn
    turned = LossInputs(
        inputs.batch,
        {r: torch.einsum("ij,njc->nic", turn, v) for r, v in inputs.student.items()},
        {r: torch.einsum("ij,njc->nic", turn, v) for r, v in inputs.teacher.items()},
    )
    assert value(term(turned)) == pytest.approx(value(term(inputs)), rel=1e-12)
    # and so are its statistics
    again = feature_loss("v2v", projection=projection, fn=fn)
    again.update_statistics(turned.teacher, turned.batch)
    again.finalize_statistics()
    torch.testing.assert_close(again.standardizer.scale, term.standardizer.scale)
    assert student.shape[1] == teacher.shape[1] == 3


@pytest.mark.parametrize("kind", ["n2n", "v2v"])
@pytest.mark.parametrize("atoms", ["all", "free"])
def test_parts_of_a_batch_add_up(kind, atoms):
    term = feature_loss(kind, atoms=atoms, standardize=False)
    inputs, _, _ = feature_inputs(term)
    (whole,) = term(inputs)
    total, count = 0.0, 0
    for rows in (slice(0, 3), slice(3, 8)):
        piece = LossInputs(SimpleNamespace(fixed=inputs.batch.fixed[rows]))
        piece.student = {r: v[rows] for r, v in inputs.student.items()}
        piece.teacher = {r: v[rows] for r, v in inputs.teacher.items()}
        (part,) = term(piece)
        total, count = total + part.total, count + part.count
    assert int(count) == int(whole.count)
    torch.testing.assert_close(total / count, whole.total / whole.count)


@pytest.mark.parametrize("atoms", ["all", "free"])
def test_no_atoms_give_an_empty_sum(atoms):
    term = feature_loss("v2v", atoms=atoms, standardize=False)
    inputs, student, _ = feature_inputs(term, atoms=0)
    student.requires_grad_()
    inputs.batch.fixed = inputs.batch.fixed[:0]
    (part,) = term(inputs)
    assert float(part.total.detach()) == int(part.count) == 0
    part.total.backward()
    assert student.grad.shape == (0, 3, STUDENT)


def test_fixed_atoms_do_not_count_where_free_ones_are_asked_for():
    term = feature_loss("n2n", atoms="free", standardize=False)
    inputs, student, teacher = feature_inputs(term)
    before = value(term(inputs))
    teacher[1] += 1e6
    student.requires_grad_()
    after = mean(term(inputs))
    after.backward()
    assert float(after.detach()) == before
    assert (student.grad.abs().sum(1) > 0).tolist() == [bool(free) for free in FREE]


def test_half_features_are_compared_in_single_precision():
    term = feature_loss("n2n", standardize=False).float()
    inputs, student, teacher = feature_inputs(term)
    inputs.student = {r: v.bfloat16() for r, v in inputs.student.items()}
    inputs.teacher = {r: v.float() for r, v in inputs.teacher.items()}
    (part,) = term(inputs)
    assert part.total.dtype == torch.float32
    projected = term.projection(student.bfloat16().float())
    want = (projected - teacher.float()).square().sum()
    torch.testing.assert_close(part.total, want, rtol=1e-6, atol=1e-6)


def test_building_draws_from_its_generator_alone():
    state = torch.get_rng_state()
    one, two = feature_loss("v2v", projection="mlp"), feature_loss("v2v", projection="mlp")
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_goes_through_a_checkpoint(tmp_path):
    term = feature_loss("n2n").float()
    inputs, _, _ = feature_inputs(term)
    inputs.student = {r: v.float() for r, v in inputs.student.items()}
    term.update_statistics(inputs.teacher, inputs.batch)
    term.finalize_statistics()
    torch.save(term.state_dict(), tmp_path / "term.pt")
    fresh = loss_class("n2n", WHERE).from_options({}, WHERE)
    (student,), (teacher,) = term.student_requests(), term.teacher_requests()
    fresh.build(
        {student: FeatureSpec("node", "node", STUDENT, "")},
        {teacher: FeatureSpec("node", "node", TEACHER, "")},
        generator(99),
    )
    assert not fresh.standardizer.fitted
    assert mean(fresh(inputs)).isnan()  # unfitted statistics cannot pass unseen
    fresh.load_state_dict(torch.load(tmp_path / "term.pt", weights_only=True))
    assert fresh.standardizer.fitted
    assert torch.equal(mean(fresh(inputs)), mean(term(inputs)))


@pytest.mark.parametrize(
    ("kind", "options", "channels"),
    [
        ("n2n", {"teacher": "node@1", "atoms": "free"}, "emb_size_atom"),
        ("e2n", {}, "emb_size_edge"),
        ("v2v", {}, "emb_size_edge"),
        ("v2v", {"teacher": "edge@1", "projection": "mlp"}, "emb_size_edge"),
    ],
)
def test_on_models_and_under_rotation(kind, options, channels):
    teacher, student = small_model("gemnet_oc").eval(), small_model("painn")
    term = loss_class(kind, WHERE).from_options(options, WHERE)
    student_tap = FeatureExtractor(student, term.student_requests())
    teacher_tap = FeatureExtractor(teacher, term.teacher_requests())
    term.build(student_tap.specs, teacher_tap.specs, generator())
    turn, _ = torch.linalg.qr(random(3, 3, seed=9).float())
    turn = turn * torch.linalg.det(turn)
    slabs = models_batch()
    turned = slabs.clone()
    turned.pos, turned.cell = slabs.pos @ turn.T, slabs.cell @ turn.T
    values = []
    for graph in (slabs, turned):
        with torch.no_grad(), teacher_tap.capture() as taught:
            teacher(graph)
        with student_tap.capture() as learned:
            student(graph)
        inputs = LossInputs(graph)
        inputs.student = {r: learned[r].values for r in term.student_requests()}
        inputs.teacher = {r: taught[r].values for r in term.teacher_requests()}
        if not values:
            term.update_statistics(inputs.teacher, graph)
            term.finalize_statistics()
        (part,) = term(inputs)
        values.append(part.total / part.count)
    atoms = len(slabs.pos) if options.get("atoms") != "free" else int((slabs.fixed == 0).sum())
    width = model_config("gemnet_oc")[channels] * (3 if kind == "v2v" else 1)
    assert int(part.count) == atoms * width
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=0)
    values[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
