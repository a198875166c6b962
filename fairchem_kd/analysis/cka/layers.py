"""The layers of models, and how similar they are, pair by pair, on the same structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from fairchem_kd.analysis.cka.similarity import GROUPS, Estimate, Form, Similarity
from fairchem_kd.errors import UserError
from fairchem_kd.features import Architecture, FeatureExtractor, Request, architecture_of
from fairchem_kd.features.address import parse_address, summarise_addresses

if TYPE_CHECKING:
    from fairchem_kd.analysis.subjects.runs import ModelFile
    from fairchem_kd.analysis.subjects.structures import Structures
    from fairchem_kd.models.frozen import Teacher

#: What is compared unless other layers are named: the states after every layer, and what the heads
#: take in.
DEFAULT = ("node@*", "edge@*", "vector@*", "node", "edge", "vector")
FORMS: tuple[Form, ...] = ("node", "vector")

Layers = dict[Form, list[str]]


def layers_of(model: nn.Module, patterns: Sequence[str] = ()) -> Layers:
    """Addresses of the model's layers in either form, from the input on, each layer once.

    In the form ``node`` stand node features and edge features summed onto their target atoms, in
    the form ``vector`` vectors and edge features summed with the edges' unit vectors.

    Args:
        model: of an architecture whose features can be tapped.
        patterns: addresses (``node@1+3``), or patterns with ``*`` and ``?``; without any,
            :data:`DEFAULT`, less what is derived from other layers.

    Raises:
        UserError: an architecture without features, or a layer that it does not have.
    """
    architecture = architecture_of(model)
    specs = architecture.specs()
    # numbered layers before what the heads take in, which comes last in the model too
    ordered = sorted(specs, key=lambda address: "@" not in address)
    found: Layers = {form: [] for form in FORMS}
    for pattern in patterns or DEFAULT:
        if any(mark in pattern for mark in "*?[") or not patterns:
            named = [address for address in ordered if fnmatchcase(address, pattern)]
            if not patterns:
                named = [address for address in named if not _is_derived(architecture, address)]
            elif not named:
                raise UserError(
                    f"no layer of {type(architecture.backbone).__name__} is called '{pattern}'; it "
                    f"offers: {summarise_addresses(specs)}"
                )
        else:
            named = [pattern]
        for address in named:
            first = parse_address(address)[0]
            kind = specs[first].kind if first in specs else "node"
            form: Form = "vector" if kind == "vector" else "node"
            FeatureExtractor(model, [Request(address, form)])  # refuses what is not offered
            if same_layer(architecture, address, found[form]) is None:
                found[form].append(address)
    return found


def _is_derived(architecture: Architecture, address: str) -> bool:
    tap = architecture.taps.get(architecture.aliases.get(address, address))
    return tap is not None and tap.to_edges is not None


def same_layer(architecture: Architecture, address: str, layers: Sequence[str]) -> str | None:
    """The one of ``layers`` that is read where ``address`` is; None where there is none."""

    def source(one: str) -> list[Any]:
        taps = [architecture.taps[architecture.aliases.get(a, a)] for a in parse_address(one)]
        return [(tap.attach, tap.to_edges) for tap in taps]

    wanted = source(address)
    return next((layer for layer in layers if source(layer) == wanted), None)


@dataclass(frozen=True)
class Mark:
    """A pair of layers that a loss brings together."""

    term: str
    form: Form
    student: str
    teacher: str


def distilled_pairs(file: ModelFile) -> list[Mark]:
    """The pairs of features that the student of ``file`` was distilled with, by its config."""
    from fairchem_kd.distillation.config import parse_distillation
    from fairchem_kd.losses import PairLoss

    try:
        terms = parse_distillation(file.config.get("task")).active_terms
    except UserError:  # of another version, or with a loss of a package that is not here
        return []
    return [
        Mark(name, term.form, term.student_request.address, term.teacher_request.address)
        for name, term in terms.items()
        if isinstance(term, PairLoss) and term.form in FORMS
    ]


def settle(mark: Mark, student: nn.Module, teacher: nn.Module, layers: Sequence[Layers]) -> Mark:
    """``mark`` in the names that ``layers`` (the student's and the teacher's) have for its ends.

    A layer that is not among them is added to them.

    Raises:
        UserError: a layer that a model does not have.
    """
    named = []
    ends = zip((student, teacher), (mark.student, mark.teacher), layers, strict=True)
    for model, address, known in ends:
        FeatureExtractor(model, [Request(address, mark.form)])
        there = same_layer(architecture_of(model), address, known[mark.form])
        if there is None:
            known[mark.form].append(address)
        named.append(there or address)
    return Mark(mark.term, mark.form, named[0], named[1])


@dataclass(frozen=True)
class Map:
    """The similarity of every layer of one model (rows) with every layer of another (columns)."""

    form: Form
    first: str
    second: str
    rows: list[str]
    columns: list[str]
    estimates: list[list[Estimate]]

    @property
    def values(self) -> NDArray[np.float64]:
        """``(R, C)``, NaN where undefined."""
        return np.array([[e.value for e in row] for row in self.estimates])

    @property
    def errors(self) -> NDArray[np.float64]:
        """Standard errors ``(R, C)``, NaN where there are none."""
        found = [[np.nan if e.error is None else e.error for e in row] for row in self.estimates]
        return np.array(found, dtype=float)

    def at(self, row: str, column: str) -> Estimate:
        """The similarity of two layers."""
        return self.estimates[self.rows.index(row)][self.columns.index(column)]

    def __sub__(self, other: Map) -> Map:
        """Layer by layer; of models with the same layers, on the same structures."""
        if (self.rows, self.columns) != (other.rows, other.columns):
            raise ValueError("maps of different layers have no difference")
        both = zip(self.estimates, other.estimates, strict=True)
        estimates = [[a - b for a, b in zip(*rows, strict=True)] for rows in both]
        second = f"{self.second} - {other.second}"
        return Map(self.form, self.first, second, self.rows, self.columns, estimates)


@dataclass(frozen=True)
class Compared:
    """What :func:`compare_layers` found."""

    maps: list[Map]
    structures: int
    atoms: int

    def map(self, form: Form, first: str, second: str) -> Map | None:
        """The map of two models in one form; None where one of them has no such layers."""
        wanted = (form, first, second)
        return next((m for m in self.maps if (m.form, m.first, m.second) == wanted), None)


def compare_layers(
    models: Mapping[str, Teacher],
    pairs: Sequence[tuple[str, str]],
    structures: Structures,
    layers: Mapping[str, Layers],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> Compared:
    """The similarity of every layer of one model with every layer of another.

    All models run over the structures once; sums in float64, of O(channels squared) for each pair
    of layers, are all that is kept.

    Args:
        models: by a name of one's own, as
            :func:`fairchem_kd.analysis.subjects.runs.load_model` gives them.
        pairs: the names of two models each.
        structures: what they run on; every atom is a sample.
        layers: of every model, as :func:`layers_of` gives them.
        batch_size: structures at a time.
        progress: show a bar on a terminal.

    Raises:
        UserError: structures that a model cannot take.
    """
    similarities = {}
    for form in FORMS:
        wanted = [
            ((first, row), (second, column))
            for first, second in pairs
            for row in layers[first][form]
            for column in layers[second][form]
        ]
        if wanted:
            similarities[form] = Similarity(form, wanted)
    taps = {
        name: FeatureExtractor(
            model.model, [Request(a, form) for form in similarities for a in layers[name][form]]
        )
        for name, model in models.items()
    }
    bar = tqdm(total=structures.count, desc="cka", disable=None if progress else True)
    seen = atoms = 0
    for number, batch in enumerate(structures.batches(batch_size)):
        place = seen / structures.count if structures.count else number % GROUPS / GROUPS
        features: dict[Form, dict[tuple[str, str], Any]] = {form: {} for form in similarities}
        for name, model in models.items():
            model.check_elements(batch.atomic_numbers)
            device = next(model.model.parameters()).device
            captured = model.forward(batch.to(device), taps[name]).features
            assert captured is not None
            for request in taps[name].specs:
                kind: Form = "vector" if request.form == "vector" else "node"
                features[kind][name, request.address] = captured[request].values
        for form, similarity in similarities.items():
            similarity.update(features[form], place)
        seen += batch.natoms.numel()
        atoms += len(batch.pos)
        bar.update(batch.natoms.numel())
    bar.close()
    maps = []
    for form, similarity in similarities.items():
        for first, second in pairs:
            rows, columns = layers[first][form], layers[second][form]
            if rows and columns:
                estimates = [
                    [similarity.cka((first, row), (second, column)) for column in columns]
                    for row in rows
                ]
                maps.append(Map(form, first, second, rows, columns, estimates))
    return Compared(maps, seen, atoms)
