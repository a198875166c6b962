"""Losses on one feature of each model: small ones, built, with inputs in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from terms import FREE, NATOMS, WHERE, generator, random

from fairchem_kd.features import GRAPH, FeatureSpec
from fairchem_kd.losses import LossInputs, loss_class

STUDENT, TEACHER = 5, 7
ATOMS = sum(NATOMS)
SYSTEMS = [0, 0, 0, 1, 2, 2, 2, 2]
#: Of the atoms of `terms.NATOMS`; atom 5 has no edge into it, and the one of system 1 none at all
#: but to its own image.
EDGES = [
    [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [2, 1, 0, 0, 0],
    [0, 2, 0, 0, 0], [3, 3, 0, 1, 0], [5, 4, 0, 0, 0], [6, 4, 0, 0, 0], [7, 4, 0, 0, 0],
    [4, 6, 0, 0, 0], [5, 6, 0, 0, -1], [4, 7, 0, 0, 0],
]  # fmt: skip


def pair_loss(kind: str, *, readout: torch.Tensor | None = None, **options: Any) -> Any:
    """A loss of that kind, built for 5 channels of the student and 7 of the teacher."""
    term = loss_class(kind, WHERE).from_options(options, WHERE)
    ours, theirs = term.student_request, term.teacher_request
    graph = FeatureSpec(*GRAPH, 5, "")
    term.build(
        {ours: FeatureSpec(*ours, STUDENT, ""), GRAPH: graph},
        {theirs: FeatureSpec(*theirs, TEACHER, "", readout), GRAPH: graph},
        generator(),
    )
    return term.double()


def pair_inputs(term: Any, *, mask: list[bool] | None = None, seed: int = 0) -> LossInputs:
    """Random features, and `EDGES` on whichever side the loss asks for."""
    xyz = (3,) if term.form == "vector" else ()
    fixed = 1 - torch.tensor(FREE)
    batch = SimpleNamespace(
        natoms=torch.tensor(NATOMS), fixed=fixed, batch=torch.tensor(SYSTEMS),
        atomic_numbers=torch.ones(ATOMS), pos=random(ATOMS, 3, seed=99),
    )  # fmt: skip
    inputs = LossInputs(
        batch,
        {term.student_request: random(ATOMS, *xyz, STUDENT, seed=seed)},
        {term.teacher_request: 2 * random(ATOMS, *xyz, TEACHER, seed=seed + 1) + 0.5},
        systems=None if mask is None else torch.tensor(mask),
        step=1,
    )
    for side, requests in (
        (inputs.student, term.student_requests()),
        (inputs.teacher, term.teacher_requests()),
    ):
        if GRAPH in requests:
            side[GRAPH] = torch.tensor(EDGES)  # type: ignore[index]
    return inputs


def fitted(term: Any, inputs: LossInputs) -> None:
    if term.needs_statistics:
        term.update_statistics(inputs.teacher, inputs.batch)
        term.finalize_statistics()


def counting(atoms: str, mask: list[bool] | None) -> list[bool]:
    """Which atoms count, by atoms: all or free, and by trusted systems."""
    return [
        (atoms == "all" or bool(FREE[i])) and (mask is None or mask[SYSTEMS[i]])
        for i in range(ATOMS)
    ]


def compared(term: Any, inputs: LossInputs) -> tuple[list[Any], list[Any]]:
    """The two features that are compared, row by row, as the loss should see them."""
    student, teacher = (
        inputs.student[term.student_request],
        inputs.teacher[term.teacher_request],
    )
    with torch.no_grad():
        if getattr(term, "projection", None) is not None:
            student = term.projection(student)
        if getattr(term, "standardizer", None) is not None:
            teacher = (teacher - term.standardizer.shift) / term.standardizer.scale
            if term.form == "vector":
                teacher = inputs.teacher[term.teacher_request] / term.standardizer.scale
    return student.tolist(), teacher.tolist()
