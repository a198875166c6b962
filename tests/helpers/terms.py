"""Loss terms, their inputs in float64, and plain Python to compare them with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from fairchem.core.modules.loss import DDPLoss

from fairchem_kd.features import FeatureSpec
from fairchem_kd.losses import LossInputs, loss_class

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


OUTPUTS = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
}


def label_losses(energy="mae", forces="l2mae", reduction="mean", coefficients=(1.0, 100.0)):
    return [
        ("energy", {"fn": DDPLoss(energy, reduction), "coefficient": coefficients[0]}),
        ("forces", {"fn": DDPLoss(forces, reduction), "coefficient": coefficients[1]}),
    ]
