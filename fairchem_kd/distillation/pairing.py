"""What a teacher and a student offer each other: which features to compare, and what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import (
    FeatureExtractor,
    FeatureSpec,
    architecture_of,
    atom_energy,
    common_energy,
    energy_name_of,
)
from fairchem_kd.losses import Labels, Loss, known_losses, loss_class
from fairchem_kd.models.frozen import Teacher

_SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Choice:
    """A loss term for a pair of models: its options, and what it compares in words."""

    kind: str
    options: dict[str, Any]
    comments: dict[str, str]  #: of options, by name


def choose(
    kind: str, student: nn.Module, teacher: Teacher, given: Mapping[str, Any] | None = None
) -> Choice:
    """The term ``kind`` for this pair, with features that both models have.

    A feature is the loss's default, or where a model does not offer that, the last layer of the
    same name.

    Args:
        kind: of a loss.
        student, teacher: the pair.
        given: options in place of those.

    Raises:
        UserError: no such loss, or one that this pair cannot have; it names those it can.
    """
    where = f"--strategy {kind}"
    made = loss_class(kind, where)
    try:
        return _choose(kind, made, student, teacher, given or {})
    except UserError as error:
        others = [name for name in known_losses() if name != kind]
        fitting = [name for name in others if _fits(name, student, teacher)]
        raise UserError(
            f"{where}: {str(error).rstrip('.')}. This pair can have: "
            f"{', '.join(fitting) or 'none'}."
        ) from None


def _fits(kind: str, student: nn.Module, teacher: Teacher) -> bool:
    try:
        _choose(kind, loss_class(kind, ""), student, teacher, {})
    except UserError:
        return False
    return True


def _choose(
    kind: str, made: type[Loss], student: nn.Module, teacher: Teacher, given: Mapping[str, Any]
) -> Choice:
    models = {"student": student, "teacher": teacher.model}
    options: dict[str, Any] = {
        side: given.get(side) or _offered(made, kind, side, address, models[side])
        for side, address in made.addresses().items()
    }
    options |= {**made.options_for(teacher.outputs), **given}
    term = made.from_options(options, kind)
    if term.needs_atom_energy:
        outputs = {name: dict(output) for name, output in teacher.outputs.items()}
        energy = common_energy(energy_name_of(student), teacher.energy_name)
        for name in term.compared_atom_energies(Labels([], outputs, energy=energy)):
            for side in _SIDES:
                FeatureExtractor(models[side], [atom_energy(name)])
    ours = FeatureExtractor(student, term.student_requests()).specs
    theirs = FeatureExtractor(teacher.model, term.teacher_requests()).specs
    term.build(ours, theirs, torch.Generator())
    comments = {}
    for side, specs in (("student", ours), ("teacher", theirs)):
        if side in options:
            comments[side] = _shown(specs.values())
    options["coefficient"] = term.coefficient
    options |= {name: getattr(term.options, name) for name in term.telling}
    return Choice(kind, options, comments)


def _offered(made: type[Loss], kind: str, side: str, address: str, model: nn.Module) -> str:
    """``address``, or the last layer of that name where the model has no default of it."""

    def check(options: dict[str, Any]) -> None:
        term = made.from_options(options, kind)
        own = term.student_requests() if side == "student" else term.teacher_requests()
        FeatureExtractor(model, own)

    try:
        check({})
        return address
    except UserError:
        layers = [a for a in architecture_of(model).specs() if re.fullmatch(rf"{address}@\d+", a)]
        if not layers:
            raise
    last = max(layers, key=lambda layer: int(layer.rpartition("@")[2]))
    check({side: last})
    return last


def _shown(specs: Iterable[FeatureSpec]) -> str:
    return "; ".join(f"{spec.shape}: {spec.description}" for spec in specs)


def differences(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """What differs between the `facts` of two models, and whether it matters."""
    notes = []
    ours, theirs = student["cutoff"], teacher["cutoff"]
    if ours and theirs and ours < theirs:
        notes.append(
            f"The student sees {ours:g} Å and the teacher {theirs:g} Å: what the teacher knows of "
            "atoms further apart reaches the student through several layers only."
        )
    if student["use_pbc"] != teacher["use_pbc"]:
        notes.append(
            f"The student has use_pbc: {str(student['use_pbc']).lower()} and the teacher "
            f"{str(teacher['use_pbc']).lower()}: both see the same structures only in a cell so "
            "large that no image is in reach."
        )
    if student["parameters"] >= teacher["parameters"]:
        notes.append("The student has no fewer parameters than the teacher.")
    return notes


def compare_normalizers(
    student: Mapping[str, Mapping[str, Any]], teacher: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[str]]:
    """Lines of a table of both models' normalisers, and notes on what is strange.

    Args:
        student: ``normalizer`` of the config's transforms; without numbers where it is fitted.
        teacher: ``mean`` and ``rmsd`` by output, in eV or eV/Å.
    """
    lines, notes = [], []
    for name in dict.fromkeys([*teacher, *student]):
        ours, theirs = student.get(name), teacher.get(name)
        lines.append(f"  {name:<8} student {_numbers(ours):<28} teacher {_numbers(theirs)}")
        try:
            ratio = _spread(ours or {}) / _spread(theirs or {})
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        if not 0.1 < ratio < 10:
            notes.append(
                f"The normalisers of {name} differ by a factor of {ratio:.3g}: outputs are "
                "compared in eV and eV/Å, so this is no error, but are units and data the same?"
            )
    return lines, notes


def _spread(values: Mapping[str, Any]) -> float:
    return float(values["rmsd"] if "rmsd" in values else values["stdev"])


def _numbers(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "none"
    shown = [
        f"{key} {values[key]:.4g}" for key in ("mean", "rmsd", "stdev")
        if isinstance(values.get(key), (int, float))
    ]  # fmt: skip
    return ", ".join(shown) or "fitted to the data"


def check_targets(outputs: Iterable[str], teacher: Teacher) -> list[str]:
    """Notes on targets that only the student has.

    Raises:
        UserError: the two have none in common.
    """
    ours, theirs = set(outputs), set(teacher.outputs)
    if not ours & theirs:
        raise UserError(
            f"The student predicts {', '.join(sorted(ours))} and {teacher.name} "
            f"{', '.join(sorted(theirs))}: they share no target, so one cannot teach the other; "
            "take a teacher of the same targets."
        )
    only = sorted(ours - theirs)
    if not only:
        return []
    return [f"The teacher does not predict {', '.join(only)}: only its features can teach that."]
