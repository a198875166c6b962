"""The losses of outputs against loops in float64, and the difference that every loss sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairchem.core.modules.loss import DDPLoss
from terms import (
    FREE,
    NATOMS,
    OUTPUTS,
    WHERE,
    batch,
    compare,
    generator,
    label_losses,
    mean,
    random,
    value,
)

from fairchem_kd.errors import UserError
from fairchem_kd.losses import Labels, LossInputs, loss_class
from fairchem_kd.losses.elementwise import elementwise


def vanilla(losses=None, outputs=OUTPUTS, **options):
    term = loss_class("vanilla", WHERE).from_options(options, WHERE)
    term.build({}, {}, generator(), Labels(label_losses() if losses is None else losses, outputs))
    return term


def output_inputs():
    inputs = LossInputs(batch())
    inputs.student_outputs = {"energy": random(3, 1), "forces": random(8, 3, seed=1)}
    inputs.teacher_outputs = {"energy": random(3, 1, seed=2), "forces": random(8, 3, seed=3)}
    return inputs


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
    term = loss_class("vanilla", WHERE).from_options({}, WHERE)
    only_forces = Labels(label_losses()[1:], OUTPUTS)
    no_forces = Labels(label_losses(coefficients=(2.0, 0.0)), OUTPUTS)
    for _ in range(2):  # what it needs is asked before and after it is built, and answered alike
        assert term.needs_outputs == ("energy", "forces")
        assert term.compared_outputs(only_forces) == ("forces",)
        assert term.compared_outputs(no_forces) == ("energy",)
        term.build({}, {}, generator(), no_forces)
    assert [part.name for part in term(output_inputs())] == ["energy"]
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
        for output in outputs.values():
            output.requires_grad_()
    mean(vanilla()(inputs)).backward()
    moved = inputs.student_outputs["forces"].grad.abs().sum(1) > 0
    assert moved.tolist() == [bool(free) for free in FREE]
    assert inputs.teacher_outputs["forces"].grad is None


def test_equal_outputs_give_zero_and_finite_gradients():
    inputs = output_inputs()
    inputs.teacher_outputs = {k: v.clone() for k, v in inputs.student_outputs.items()}
    for output in inputs.student_outputs.values():
        output.requires_grad_()
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
    student, teacher = random(8, 1), random(8, 1, seed=1)
    inputs.student_atom_energies = {"energy": student}
    inputs.teacher_atom_energies = {"energy": teacher}
    pairs = zip(student, teacher, strict=True)
    want = sum(compare(fn, s - t) for s, t in pairs) / 8
    assert value(term(inputs)) == pytest.approx(want, rel=1e-12)


def test_per_atom_energy_defaults_and_errors():
    term = loss_class("per_atom_energy", WHERE).from_options({}, WHERE)
    assert term.options.fn == "mae"
    with pytest.raises(ValueError, match="needs the energy per atom of both"):
        term(LossInputs(batch()))


def test_elementwise_never_broadcasts():
    with pytest.raises(ValueError, match=r"student \(3, 1\) and teacher \(3,\) differ"):
        elementwise("mse", torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="fn must be one of mse, mae, huber, not 'l2'"):
        elementwise("l2", torch.zeros(3), torch.zeros(3))


def test_elementwise_in_single_precision():
    student, teacher = torch.full((2,), 300.0, dtype=torch.float16), torch.zeros(2)
    assert elementwise("mse", student, teacher).tolist() == [90000.0] * 2  # fp16 ends at 65504


def test_vanilla_of_half_outputs_does_not_overflow():
    """As under autocast: a sum of squares over atoms leaves the range of float16."""
    losses = [("forces", {"fn": DDPLoss("mse", "mean"), "coefficient": 1.0})]
    term = vanilla(losses, {"forces": {"level": "atom"}})
    forces = torch.full((400, 3), 9.0)
    (part,) = term(
        LossInputs(
            SimpleNamespace(natoms=torch.tensor([400]), fixed=torch.zeros(400)),
            student_outputs={"forces": forces.half()},
            teacher_outputs={"forces": -forces},
        )
    )
    assert (part.total / part.count).item() == pytest.approx(18.0**2)


@pytest.mark.parametrize("forces", ["l2mae", "mae"])
def test_what_structures_weigh_multiplies_their_values(forces):
    """In vanilla by target, in per_atom_energy by that of the energy; as a loop has it."""
    systems = [0, 0, 0, 1, 2, 2, 2, 2]
    inputs = output_inputs()
    inputs.batch.batch = torch.tensor(systems)
    inputs.weights = {"energy": torch.tensor([0.5, 2.0, 0.0]), "forces": torch.tensor([3.0, 1, 0])}
    parts = {part.name: part for part in vanilla(label_losses("mae", forces))(inputs)}
    s, t, weights = inputs.student_outputs, inputs.teacher_outputs, inputs.weights
    energy = sum(
        float(weights["energy"][b]) * abs(float(s["energy"][b] - t["energy"][b])) for b in range(3)
    )
    assert float(parts["energy"].total) == pytest.approx(energy)
    total = 0.0
    for i, system in enumerate(systems):
        d = [float(x) for x in s["forces"][i] - t["forces"][i]]
        own = sum(x * x for x in d) ** 0.5 if forces == "l2mae" else sum(map(abs, d))
        total += FREE[i] * float(weights["forces"][system]) * own
    assert float(parts["forces"].total) == pytest.approx(total)
    assert int(parts["forces"].count) == sum(FREE) * (1 if forces == "l2mae" else 3)
    shares = LossInputs(
        inputs.batch,
        student_atom_energies={"energy": random(8, 1, seed=4)},
        teacher_atom_energies={"energy": random(8, 1, seed=5)},
        weights=inputs.weights,
    )
    (part,) = loss_class("per_atom_energy", WHERE).from_options({}, WHERE)(shares)
    ours, theirs = shares.student_atom_energies["energy"], shares.teacher_atom_energies["energy"]
    expected = sum(
        float(weights["energy"][systems[i]]) * abs(float(ours[i] - theirs[i])) for i in range(8)
    )
    assert float(part.total) == pytest.approx(expected)
