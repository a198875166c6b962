"""The similarity of layers of finished runs, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from fairchem_kd.analysis.cka import tables as shown
from fairchem_kd.analysis.cka.layers import Form, Mark, distilled_pairs, layers_of
from fairchem_kd.analysis.cka.study import BEFORE, STUDENT, TEACHER, similarities
from fairchem_kd.analysis.subjects.runs import ModelFile, find_checkpoint, load_model, read_model
from fairchem_kd.analysis.subjects.structures import data_of, open_structures
from fairchem_kd.errors import UserError
from fairchem_kd.features import available_features
from fairchem_kd.features.address import parse_address
from fairchem_kd.machine import choose_device
from fairchem_kd.report.study import Study


def study(
    student: Path,
    *,
    teacher: Path | None = None,
    before: Path | None = None,
    data: str | None = None,
    samples: int = 500,
    student_layers: Sequence[str] = (),
    teacher_layers: Sequence[str] = (),
    pairs: Sequence[str] = (),
    batch_size: int = 16,
    cpu: bool = False,
    trust: bool = False,
) -> Study:
    """Compare the layers of a student with its teacher's, and with those it had before.

    Args:
        student: a run's folder or a checkpoint.
        teacher: likewise; the one that the student was distilled from where none is given.
        before: the student without or before distillation.
        data: structures; the student's test set where none are given.
        samples: of them; 0 for all.
        student_layers: addresses or patterns; all where none are given.
        teacher_layers: likewise.
        pairs: ``STUDENT:TEACHER`` to mark, in place of the layers that were distilled.
        batch_size: structures at a time.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle files that may run code.

    Raises:
        UserError: models, layers or data that cannot be compared.
    """
    files = {STUDENT: read_model(student, trust=trust)}
    own_teacher = files[STUDENT].teacher
    named = teacher or own_teacher
    if named is None:
        raise UserError(
            f"{files[STUDENT].path} was not distilled from a teacher: name one with --teacher."
        )
    files[TEACHER] = read_model(named, trust=trust)
    if before is not None:
        files[BEFORE] = read_model(before, trust=trust)
    is_own = own_teacher is not None and find_checkpoint(Path(named)) == Path(own_teacher)
    marks = distilled_pairs(files[STUDENT]) if is_own else []
    source = data or data_of(files[STUDENT])
    device = choose_device(cpu=cpu)
    models = {role: load_model(file, device) for role, file in files.items()}
    layers = {
        TEACHER: layers_of(models[TEACHER].model, teacher_layers),
        STUDENT: layers_of(models[STUDENT].model, student_layers),
    }
    if pairs:
        marks = [_pair(text, models[STUDENT].model) for text in pairs]
    with open_structures(source, limit=samples or None) as structures:
        found = similarities(
            models,
            structures,
            layers,
            names=_names(files),
            marks=marks,
            distilled=not pairs,
            batch_size=batch_size,
            progress=True,
        )
    return Study(
        "cka",
        tables=partial(shown.tables, found),
        figures=partial(shown.figures, found),
        as_dict=partial(shown.as_dict, found),
    )


def _names(files: Mapping[str, ModelFile]) -> dict[str, str]:
    """What each model is called; its role goes with names that are not told apart."""
    names = {role: file.identifier for role, file in files.items()}
    if len(set(names.values())) < len(names):
        names = {role: f"{name} ({role})" for role, name in names.items()}
    return names


def _pair(text: str, student: nn.Module) -> Mark:
    """The mark that ``STUDENT:TEACHER`` names; its form is that of the student's layer."""
    ours, separator, theirs = text.partition(":")
    if not separator or not ours or not theirs:
        raise UserError(f"--pair '{text}' does not read STUDENT:TEACHER, for example node:edge@2.")
    specs = available_features(student)
    first = parse_address(ours)[0]
    form: Form = "vector" if first in specs and specs[first].kind == "vector" else "node"
    return Mark(text, form, ours, theirs)
