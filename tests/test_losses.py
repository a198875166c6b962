"""Every loss against loops in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from fairchem.core.modules.loss import DDPLoss
from models import batch as models_batch
from models import model_config, small_model
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, FeatureSpec, Request
from fairchem_kd.losses import (
    DEFAULT_COEFFICIENTS,
    Loss,
    LossInputs,
    Part,
    known_losses,
    loss_class,
    register_loss,
)
from fairchem_kd.losses.elementwise import elementwise
from fairchem_kd.standardize import FLOOR, Standardizer

WHERE = "task.distillation.losses.term"
NATOMS = [3, 1, 4]
STUDENT, TEACHER = 5, 7
FREE = [1, 0, 1, 1, 1, 0, 0, 1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def batch():
    fixed = 1 - torch.tensor(FREE)
    return SimpleNamespace(natoms=torch.tensor(NATOMS), fixed=fixed)


def mean(parts):
    """The value of a loss: weighted means of its parts."""
    values = [p.weight * (p.total if p.count is None else p.total / p.count) for p in parts]
    return sum(values)


def value(parts):
    return float(mean(parts).detach())


def compare(fn, difference, delta=1.0):
    """One element, in plain Python."""
    d = abs(float(difference))
    if fn == "huber":
        return d * d / 2 if d <= delta else delta * (d - delta / 2)
    return d * d if fn == "mse" else d


# -- features -------------------------------------------------------------------------------------


def feature_loss(kind, student_channels=STUDENT, teacher_channels=TEACHER, **options):
    term = loss_class(kind, WHERE).from_options(options, WHERE)
    form = "vector" if kind == "v2v" else "node"
    (student,), (teacher,) = term.student_requests(), term.teacher_requests()
    assert student.form == teacher.form == form
    term.build(
        {student: FeatureSpec(student.address, form, student_channels, "")},
        {teacher: FeatureSpec(teacher.address, form, teacher_channels, "")},
        generator(),
    )
    return term.double()


def feature_inputs(term, student_channels=STUDENT, teacher_channels=TEACHER, atoms=8, seed=0):
    xyz = (3,) if term.kind == "v2v" else ()
    student = random(atoms, *xyz, student_channels, seed=seed)
    teacher = 2.0 * random(atoms, *xyz, teacher_channels, seed=seed + 1) + 0.5
    inputs = LossInputs(batch())
    inputs.student = {term.student_requests()[0]: student}
    inputs.teacher = {term.teacher_requests()[0]: teacher}
    return inputs, student, teacher


def standardised(teacher, rows):
    """Loops over channels: mean and std over the given atoms, or rms over atoms and xyz."""
    result = teacher.clone()
    for c in range(teacher.shape[-1]):
        seen = [float(x) for i in rows for x in teacher[i, ..., c].reshape(-1)]
        shift = 0.0 if teacher.dim() == 3 else sum(seen) / len(seen)
        scale = (sum((x - shift) ** 2 for x in seen) / len(seen)) ** 0.5
        result[..., c] = (teacher[..., c] - shift) / scale
    return result


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
    values = [
        compare(fn, a - b, 0.7)
        for i in rows
        for a, b in zip(projected[i].flatten(), teacher[i].flatten(), strict=True)
    ]
    (part,) = term(inputs)
    assert part.name == ""
    assert part.weight == 1.0
    assert int(part.count) == len(values)
    # the standardizer's shift and scale are rounded to fp32
    assert float(part.total.detach()) == pytest.approx(
        sum(values), rel=1e-5 if standardize else 1e-12
    )


def test_linear_n2n_written_out():
    term = feature_loss("n2n", standardize=False)
    inputs, student, teacher = feature_inputs(term)
    weight, bias = term.projection.weight.detach(), term.projection.bias.detach()
    total = 0.0
    for i, d in itertools.product(range(8), range(TEACHER)):
        m = sum(float(weight[d, h] * student[i, h]) for h in range(STUDENT))
        total += (m + float(bias[d]) - float(teacher[i, d])) ** 2
    assert value(term(inputs)) == pytest.approx(total / (8 * TEACHER), rel=1e-12)


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


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("reflect", [False, True])
def test_v2v_is_invariant(projection, reflect):
    term = feature_loss("v2v", projection=projection)
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
    again = feature_loss("v2v", projection=projection)
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


def test_defaults_of_the_kinds():
    defaults = {
        "n2n": (Request("node", "node"), Request("node", "node")),
        "e2n": (Request("node", "node"), Request("edge", "node")),
        "v2v": (Request("vector", "vector"), Request("vector", "vector")),
    }
    for kind, (student, teacher) in defaults.items():
        term = loss_class(kind, WHERE).from_options({}, WHERE)
        options = term.options
        assert term.student_requests() == [student]
        assert term.teacher_requests() == [teacher]
        assert (options.fn, options.projection, options.atoms) == ("mse", "linear", "all")
        assert options.standardize is True
        assert term.needs_outputs == ()
        assert not term.needs_atom_energy
    assert set(known_losses()) >= set(DEFAULT_COEFFICIENTS)
    for kind, coefficient in DEFAULT_COEFFICIENTS.items():
        term = loss_class(kind, WHERE).from_options({}, WHERE)
        assert term.kind == kind
        assert term.coefficient == coefficient
        assert term.schedule.factor(10, 100) == 1.0


def test_options_as_the_command_line_gives_them():
    given = {
        "fn": "huber",
        "delta": "1e-1",
        "student": "node@2",
        "teacher": "node@1+3",
        "standardize": "false",
        "coefficient": "3e-1",
        "schedule": {"warmup_steps": "500", "decay": "cosine", "final": "0.1"},
    }
    term = loss_class("n2n", WHERE).from_options(given, WHERE)
    assert term.student_requests() == [Request("node@2", "node")]
    assert term.teacher_requests() == [Request("node@1+3", "node")]
    assert (term.coefficient, term.options.delta, term.options.standardize) == (0.3, 0.1, False)
    assert term.schedule.factor(250, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("n2n", {"coefficient": -1}, "term.coefficient must be at least 0, not -1"),
        ("n2n", {"coefficient": "many"}, "term.coefficient must be a number"),
        ("n2n", {"fn": "msee"}, r"term.fn cannot be 'msee' \(did you mean 'mse'\?\)"),
        ("n2n", {"projektion": "mlp"}, r"'projektion' \(did you mean 'projection'\?\)"),
        ("e2n", {"atoms": "none"}, "term.atoms cannot be 'none'"),
        ("v2v", {"delta": 0}, "term.delta must be greater than 0"),
        ("vanilla", {"fn": "mse"}, "unknown key 'fn'"),
        ("vanilla", {"forces": -2}, "term.forces must be at least 0"),
        ("per_atom_energy", {"schedule": {"decay": "cos"}}, "schedule.decay cannot be 'cos'"),
    ],
)
def test_options_that_do_not_fit(kind, given, message):
    with pytest.raises(UserError, match=message):
        loss_class(kind, WHERE).from_options(given, WHERE)


def test_identity_with_unequal_channels():
    with pytest.raises(UserError) as error:
        feature_loss("n2n", student="node@2", projection="identity")
    for words in (f"{WHERE}.projection", "'node@2' has 5", "'node' has 7", "use linear"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "side", "wrong"),
    [("v2v", "student", "node"), ("v2v", "teacher", "node"), ("n2n", "teacher", "vector")],
)
def test_features_of_the_wrong_kind(kind, side, wrong):
    term = loss_class(kind, WHERE).from_options({side: "thing"}, WHERE)
    right = "vector" if kind == "v2v" else "node"
    specs = {
        name: {r: FeatureSpec(r.address, wrong if name == side else right, 4, "")}
        for name, (r,) in (
            ("student", term.student_requests()),
            ("teacher", term.teacher_requests()),
        )
    }
    with pytest.raises(UserError) as error:
        term.build(specs["student"], specs["teacher"], generator())
    for words in (f"{WHERE}.{side}", f"{kind} compares {right}", f"'thing' of the {side}", wrong):
        assert words in str(error.value)


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


# -- standardisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_streamed_statistics_equal_those_of_the_whole(kind):
    shape = (50, 3, 4) if kind == "vector" else (50, 4)
    values = random(*shape) * torch.tensor([1.0, 3.0, 0.2, 50.0]) + 2.0
    whole, streamed = Standardizer(kind, 4), Standardizer(kind, 4)
    whole.update(values)
    for piece in values.split([1, 20, 0, 29]):
        streamed.update(piece)
    for standardizer in (whole, streamed):
        standardizer.finalize()
    torch.testing.assert_close(streamed.scale, whole.scale, rtol=1e-6, atol=0)
    want = standardised(values, range(50))
    torch.testing.assert_close(streamed(values), want, rtol=1e-5, atol=1e-5)


def test_large_means_do_not_cancel():
    values = random(1000, 2) * 1e-3 + 1e6
    standardizer = Standardizer("node", 2)
    for piece in values.split(7):
        standardizer.update(piece)
    standardizer.finalize()
    expected = values.var(0, correction=0).sqrt()
    torch.testing.assert_close(standardizer.scale.double(), expected, rtol=1e-6, atol=0)


def test_vectors_are_scaled_without_a_shift():
    values = random(40, 3, 2) + 5.0
    standardizer = Standardizer("vector", 2)
    standardizer.update(values)
    standardizer.finalize()
    assert not standardizer.shift.any()
    assert not standardizer(torch.zeros(1, 3, 2)).any()
    rms = standardizer(values).square().mean((0, 1))
    torch.testing.assert_close(rms, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_constant_channels_get_the_floor(kind):
    shape = (30, 3, 5) if kind == "vector" else (30, 5)
    values = random(*shape) * torch.tensor([1.0, 2.0, 4.0, 0.0, 1e-9])
    if kind == "node":
        values[..., 3] = 100.0
    standardizer = Standardizer(kind, 5)
    standardizer.update(values)
    standardizer.finalize()
    spread = (values - (values.mean(0) if kind == "node" else 0)).reshape(-1, 5)
    spread = spread.square().mean(0).sqrt()
    torch.testing.assert_close(standardizer.scale[:3].double(), spread[:3], rtol=1e-6, atol=0)
    floor = FLOOR * spread[:3].median()
    torch.testing.assert_close(standardizer.scale[3:].double(), floor.expand(2), rtol=1e-6, atol=0)
    assert standardizer(values)[..., 3:].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_all_channels_constant(kind):
    standardizer = Standardizer(kind, 2)
    standardizer.update(torch.zeros(4, 3, 2) if kind == "vector" else torch.full((4, 2), 7.0))
    standardizer.finalize()
    assert standardizer.scale.tolist() == [1.0, 1.0]


def test_statistics_that_cannot_be():
    standardizer = Standardizer("node", 3, "The thing")
    with pytest.raises(ValueError, match="The thing: no values"):
        standardizer.finalize()
    for wrong in (torch.zeros(4, 2), torch.zeros(4, 3, 3)):
        with pytest.raises(ValueError, match=r"The thing must be \(N, 3\), not"):
            standardizer.update(wrong)
    with pytest.raises(ValueError, match=r"must be \(N, 3, 3\), not \(4, 3\)"):
        Standardizer("vector", 3).update(torch.zeros(4, 3))
    term = feature_loss("n2n")
    inputs, _, teacher = feature_inputs(term)
    teacher[2, 1] = float("nan")
    term.update_statistics(inputs.teacher, inputs.batch)
    with pytest.raises(UserError, match=f"'node'.*not finite.*{WHERE} cannot be standardised"):
        term.finalize_statistics()


# -- outputs --------------------------------------------------------------------------------------

OUTPUTS = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
}


def label_losses(energy="mae", forces="l2mae", reduction="mean", coefficients=(1.0, 100.0)):
    return [
        ("energy", {"fn": DDPLoss(energy, reduction), "coefficient": coefficients[0]}),
        ("forces", {"fn": DDPLoss(forces, reduction), "coefficient": coefficients[1]}),
    ]


def output_inputs():
    inputs = LossInputs(batch())
    inputs.student_outputs = {"energy": random(3, 1), "forces": random(8, 3, seed=1)}
    inputs.teacher_outputs = {"energy": random(3, 1, seed=2), "forces": random(8, 3, seed=3)}
    return inputs


def vanilla(losses=None, outputs=OUTPUTS, **options):
    term = loss_class("vanilla", WHERE).from_options(options, WHERE)
    term.set_label_losses(label_losses() if losses is None else losses, outputs)
    return term


def vanilla_reference(inputs, energy, forces, free, reduction, coefficients=(1.0, 100.0)):
    s, t = inputs.student_outputs, inputs.teacher_outputs
    e_values = []
    for b, natoms in enumerate(NATOMS):
        d = float(s["energy"][b, 0] - t["energy"][b, 0])
        e_values.append({"mae": abs(d), "mse": d * d, "per_atom_mae": abs(d) / natoms}[energy])
    f_values = []
    for i, is_free in enumerate(FREE):
        if free and not is_free:
            continue
        d = [float(x) for x in s["forces"][i] - t["forces"][i]]
        if forces == "l2mae":
            f_values.append(sum(x * x for x in d) ** 0.5)
        else:
            f_values += [compare(forces, x) for x in d]
    e, f = sum(e_values), sum(f_values)
    if reduction == "mean":
        e, f = e / len(e_values), f / len(f_values)
    return coefficients[0] * e + coefficients[1] * f


@pytest.mark.parametrize("energy", ["mae", "mse", "per_atom_mae"])
@pytest.mark.parametrize("forces", ["l2mae", "mae", "mse"])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_vanilla_equals_loops(energy, forces, free, reduction):
    outputs = {"energy": {"level": "system"}, "forces": {"level": "atom"}}
    outputs["forces"]["train_on_free_atoms"] = free
    term = vanilla(label_losses(energy, forces, reduction), outputs)
    inputs = output_inputs()
    parts = term(inputs)
    assert [p.name for p in parts] == ["energy", "forces"]
    assert [p.weight for p in parts] == [1.0, 100.0]
    want = vanilla_reference(inputs, energy, forces, free, reduction)
    assert value(parts) == pytest.approx(want, rel=1e-12)


def test_vanilla_equals_the_training_loss_with_the_teacher_as_label():
    inputs = output_inputs()
    losses = label_losses()
    free = inputs.batch.fixed == 0
    s, t = inputs.student_outputs, inputs.teacher_outputs
    want = losses[0][1]["fn"](s["energy"], t["energy"], natoms=inputs.batch.natoms)
    forces = losses[1][1]["fn"](s["forces"][free], t["forces"][free], natoms=inputs.batch.natoms)
    torch.testing.assert_close(mean(vanilla(losses)(inputs)), want + 100.0 * forces)


def test_vanilla_with_its_own_coefficients():
    inputs = output_inputs()
    want = vanilla_reference(inputs, "mae", "l2mae", True, "mean", (5.0, 0.5))
    assert value(vanilla(energy=5, forces="0.5")(inputs)) == pytest.approx(want, rel=1e-12)
    no_forces = vanilla(forces=0)
    assert no_forces.needs_outputs == ("energy",)
    assert [p.name for p in no_forces(inputs)] == ["energy"]


def test_vanilla_follows_the_training_loss():
    before = loss_class("vanilla", WHERE).from_options({}, WHERE)
    assert before.needs_outputs == ("energy", "forces")
    assert vanilla(label_losses()[1:]).needs_outputs == ("forces",)
    assert vanilla(label_losses(coefficients=(2.0, 0.0))).needs_outputs == ("energy",)
    two = [*label_losses(), ("energy", {"fn": DDPLoss("mse", "mean"), "coefficient": 3.0})]
    parts = vanilla(two, energy=8.0)(output_inputs())
    assert [(p.name, p.weight) for p in parts] == [
        ("energy0", 2.0),
        ("energy1", 6.0),
        ("forces", 100.0),
    ]


def test_vanilla_gradients_leave_fixed_atoms_and_the_teacher_alone():
    inputs = output_inputs()
    for outputs in (inputs.student_outputs, inputs.teacher_outputs):
        for value in outputs.values():
            value.requires_grad_()
    mean(vanilla()(inputs)).backward()
    moved = inputs.student_outputs["forces"].grad.abs().sum(1) > 0
    assert moved.tolist() == [bool(free) for free in FREE]
    assert inputs.teacher_outputs["forces"].grad is None


def test_equal_outputs_give_zero_and_finite_gradients():
    inputs = output_inputs()
    inputs.teacher_outputs = {k: v.clone() for k, v in inputs.student_outputs.items()}
    for value in inputs.student_outputs.values():
        value.requires_grad_()
    loss = mean(vanilla()(inputs))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(v.grad.isfinite().all() for v in inputs.student_outputs.values())


def test_vanilla_errors():
    with pytest.raises(UserError, match=r"term.energy is 2, but loss_functions has no energy"):
        vanilla(label_losses()[1:], energy=2)
    with pytest.raises(UserError, match="neither energy nor forces"):
        vanilla(energy=0, forces=0)
    inputs = output_inputs()
    inputs.teacher_outputs["energy"] = inputs.teacher_outputs["energy"].view(-1)
    with pytest.raises(ValueError, match=r"energy of the student \(3, 1\).*\(3,\) differ"):
        vanilla()(inputs)


@pytest.mark.parametrize("fn", ["mae", "mse", "huber"])
def test_per_atom_energy_equals_loops(fn):
    term = loss_class("per_atom_energy", WHERE).from_options({"fn": fn}, WHERE)
    assert term.needs_atom_energy
    inputs = LossInputs(batch())
    inputs.student_atom_energy, inputs.teacher_atom_energy = random(8, 1), random(8, 1, seed=1)
    pairs = zip(inputs.student_atom_energy, inputs.teacher_atom_energy, strict=True)
    want = sum(compare(fn, s - t) for s, t in pairs) / 8
    assert value(term(inputs)) == pytest.approx(want, rel=1e-12)


def test_per_atom_energy_defaults_and_errors():
    term = loss_class("per_atom_energy", WHERE).from_options({}, WHERE)
    assert term.options.fn == "mae"
    with pytest.raises(ValueError, match="needs the energies per atom of both"):
        term(LossInputs(batch()))


# -- elementwise ----------------------------------------------------------------------------------


def test_elementwise_never_broadcasts():
    with pytest.raises(ValueError, match=r"student \(3, 1\) and teacher \(3,\) differ"):
        elementwise("mse", torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="fn must be one of mse, mae, huber, not 'l2'"):
        elementwise("l2", torch.zeros(3), torch.zeros(3))


def test_elementwise_in_single_precision():
    student, teacher = torch.full((2,), 300.0, dtype=torch.float16), torch.zeros(2)
    assert elementwise("mse", student, teacher).tolist() == [90000.0] * 2  # fp16 ends at 65504


# -- losses of one's own --------------------------------------------------------------------------


class Constant(Loss):
    """A loss of another package, named by its path."""

    def forward(self, inputs):
        return [Part("", 1.0, torch.ones(()), None)]


def test_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setattr("fairchem_kd.losses.base._LOSSES", known_losses())
    registered = register_loss("constant")(Constant)
    assert loss_class("constant", WHERE) is registered
    term = loss_class("constant", WHERE).from_options({"coefficient": 2}, WHERE)
    assert (term.kind, term.coefficient) == ("constant", 2.0)
    assert value(term(LossInputs(batch()))) == 1.0
    with pytest.raises(ValueError, match="'n2n' exists already"):
        register_loss("n2n")(Constant)


def test_a_loss_by_its_path():
    assert loss_class(f"{__name__}.Constant", WHERE) is Constant
    for path, message in (
        ("no_such_package.Loss", "cannot be imported"),
        ("fairchem_kd.losses.NoSuchLoss", "cannot be imported"),
        ("torch.nn.Linear", "is not a subclass of fairchem_kd.losses.Loss"),
        ("n3n", r"unknown kind 'n3n' \(did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            loss_class(path, WHERE)


def test_terms_are_modules_that_a_trainer_can_hold():
    terms = nn.ModuleDict({"a": feature_loss("n2n"), "b": vanilla()})
    assert {name.split(".")[0] for name, _ in terms.named_parameters()} == {"a"}
    assert {"a.standardizer.scale", "a.projection.weight"} <= set(terms.state_dict())


def test_vanilla_of_half_outputs_does_not_overflow():
    """As under autocast: a sum of squares over atoms leaves the range of float16."""
    from fairchem.core.modules.loss import DDPLoss

    term = loss_class("vanilla", "w").from_options({}, "w")
    label_losses = [("forces", {"fn": DDPLoss("mse", "mean"), "coefficient": 1.0})]
    term.set_label_losses(label_losses, {"forces": {"level": "atom"}})
    forces = torch.full((400, 3), 9.0)
    batch = SimpleNamespace(natoms=torch.tensor([400]), fixed=torch.zeros(400))
    (part,) = term(
        LossInputs(
            batch,
            student_outputs={"forces": forces.half()},
            teacher_outputs={"forces": -forces},
        )
    )
    assert (part.total / part.count).item() == pytest.approx(18.0**2)
