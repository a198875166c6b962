"""Which features of a teacher a student could follow: pairs of layers, the most alike first.

An untrained student's layers already say something of the structures that they see. Where a
teacher's layer shares nothing with them, a loss on that pair teaches little: the student has to
find out first what it is told. The similarity is linear CKA (see `similarity`), on structures of
the student's own. Embeddings of the elements are left out: all models have those in common.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fairchem_kd.analysis.cka.layers import FORMS, Layers, compare_layers, layers_of, same_layer
from fairchem_kd.analysis.cka.similarity import Estimate
from fairchem_kd.features import architecture_of

if TYPE_CHECKING:
    from fairchem_kd.analysis.subjects.structures import Structures
    from fairchem_kd.models.frozen import Teacher

#: Losses on features, by the kinds of the student's and of the teacher's feature.
KINDS = {("node", "node"): "n2n", ("node", "edge"): "e2n", ("vector", "vector"): "v2v"}
_EMBEDDING = re.compile(r"@0$")
ALIKE = 0.1  #: below this a pair has next to nothing in common


@dataclass(frozen=True)
class Candidate:
    """A pair of layers, and how similar they are before any training."""

    kind: str  #: the loss that compares them
    student: str
    teacher: str
    similarity: Estimate
    last: bool  #: the student's heads take this layer in


def candidates(student: Teacher, teacher: Teacher, structures: Structures) -> list[Candidate]:
    """Every pair that a loss on features compares, the most similar of each kind first.

    Args:
        student: with the weights that it starts from, as a frozen model.
        teacher: of which it is to learn.
        structures: both run on them.

    Raises:
        UserError: a model without features, or structures that one cannot take.
    """
    layers: Mapping[str, Layers] = {
        "student": _later(layers_of(student.model)),
        "teacher": _later(layers_of(teacher.model)),
    }
    architecture = architecture_of(student.model)
    last = {
        same_layer(architecture, form, layers["student"][form]) or form
        for form in FORMS  # which are also the names of what heads take in
        if form in architecture.specs()
    }
    models = {"student": student, "teacher": teacher}
    found = compare_layers(models, [("student", "teacher")], structures, layers)
    ours = architecture_of(student.model).specs()
    theirs = architecture_of(teacher.model).specs()
    made = []
    for one in found.maps:
        for row in one.rows:
            for column in one.columns:
                kind = KINDS.get((ours[row].kind, theirs[column].kind))
                similarity = one.at(row, column)
                if kind is not None and similarity.value == similarity.value:
                    made.append(Candidate(kind, row, column, similarity, row in last))
    order = list(KINDS.values())
    return sorted(made, key=lambda c: (order.index(c.kind), -c.similarity.value))


def _later(layers: Layers) -> Layers:
    """Without what the models begin with, before any atom has heard of another."""
    return {form: [a for a in found if not _EMBEDDING.search(a)] for form, found in layers.items()}


def best(ranked: list[Candidate]) -> dict[str, Candidate]:
    """Of each kind, the pair whose teacher's end is most like what the student's heads take in.

    A loss further down would leave alone what comes after it.
    """
    found: dict[str, Candidate] = {}
    for one in ranked:
        if one.last:
            found.setdefault(one.kind, one)
    return found


def told(ranked: list[Candidate], most: int = 3) -> list[str]:
    """Lines for a terminal: the first pairs of each kind."""
    lines = ["features that are alike (CKA of the untrained student's with the teacher's):"]
    shown: dict[str, int] = {}
    for one in ranked:
        shown[one.kind] = shown.get(one.kind, 0) + 1
        if shown[one.kind] <= most:
            error = one.similarity.error
            spread = "" if error is None else f" +- {error:.2f}"
            pair = f"{one.student} - {one.teacher}"
            lines.append(f"  {one.kind:<4} {pair:<24} {one.similarity.value:.2f}{spread}")
    return lines
