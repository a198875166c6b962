"""Whether distillation made the student's layers more like the teacher's: a study.

    models, structures -> similarities -> Similarities -> tables, as_dict, figures

``fairchem-kd cka`` is these functions on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fairchem_kd.analysis.cka.layers import (
    FORMS,
    Compared,
    Layers,
    Mark,
    compare_layers,
    settle,
)
from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request

if TYPE_CHECKING:
    from fairchem_kd.analysis.subjects.structures import Structures
    from fairchem_kd.models.frozen import Teacher

FORMAT = 1
TEACHER, BEFORE, STUDENT = "teacher", "before", "student"
_FORM_NAMES = {
    "node": "node features, and edge features summed onto their target atoms",
    "vector": "node vectors, and edge features summed with the edges' unit vectors",
}


@dataclass(frozen=True)
class Similarities:
    """Maps of teacher and student, and of the student before and after.

    ``names`` and ``paths`` are by role: ``teacher``, ``student`` and, where one was given,
    ``before``.
    """

    compared: Compared
    names: dict[str, str]
    paths: dict[str, str]
    marks: list[Mark]
    data: str
    distilled: bool = True  #: the marked layers are those that a loss compares

    @property
    def meaning(self) -> str:
        """What a mark says of its layers."""
        return "compared by the loss" if self.distilled else "chosen to be marked"

    @property
    def has_before(self) -> bool:
        return BEFORE in self.names


def similarities(
    models: dict[str, Teacher],
    structures: Structures,
    layers: dict[str, Layers],
    *,
    names: dict[str, str],
    marks: Sequence[Mark] = (),
    distilled: bool = True,
    batch_size: int = 16,
    progress: bool = False,
) -> Similarities:
    """Compare a student's layers with its teacher's, and with those it had before.

    Args:
        models: by role: ``teacher``, ``student`` and, if there is one, ``before``: the same
            architecture as the student, trained without distillation or not at all.
        structures: on which they are compared; every atom is a sample.
        layers: of teacher and student, as :func:`fairchem_kd.analysis.cka.layers.layers_of` gives
            them.
        names: what to call each.
        marks: pairs of layers to mark, which are compared in any case.
        distilled: they are those that were distilled.
        batch_size: structures at a time.
        progress: show a bar on a terminal.

    Raises:
        UserError: layers that are missing, structures that a model cannot take, or fewer than four
            atoms.
    """
    layers = {role: {form: list(own[form]) for form in FORMS} for role, own in layers.items()}
    student, teacher = models[STUDENT].model, models[TEACHER].model
    settled = [settle(mark, student, teacher, (layers[STUDENT], layers[TEACHER])) for mark in marks]
    pairs = [(TEACHER, STUDENT)]
    if BEFORE in models:
        layers[BEFORE] = layers[STUDENT]
        wanted = [Request(address, form) for form in FORMS for address in layers[STUDENT][form]]
        try:
            FeatureExtractor(models[BEFORE].model, wanted)
        except UserError as error:
            raise UserError(
                f"{models[BEFORE].name} has not the layers of {models[STUDENT].name}, whose "
                f"architecture it should be of to be what that was before: {error}"
            ) from error
        pairs += [(TEACHER, BEFORE), (BEFORE, STUDENT)]
    compared = compare_layers(
        models, pairs, structures, layers, batch_size=batch_size, progress=progress
    )
    if compared.atoms < 4:
        raise UserError(
            f"{structures.path} gives {compared.atoms} atoms, and unbiased CKA needs four at the "
            "very least (hundreds, to say anything): take more structures."
        )
    paths = {role: model.name for role, model in models.items()}
    return Similarities(compared, names, paths, settled, structures.path, distilled)


# -- tables ----------------------------------------------------------------------------------------


# -- machines and files ----------------------------------------------------------------------------
