"""The names of features, and what a captured feature holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fairchem_kd.errors import UserError

Kind = Literal["node", "vector", "edge"]

_ADDRESS = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:@(?P<layers>\d+(?:\+\d+)*))?")
_ATOMS = "atom_energy"
_OF_OUTPUT = re.compile(rf"{_ATOMS}@[\w-]+")


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature address stands for in one model, known before any forward.

    ``channels`` is C in ``(N, C)`` (kind node), ``(N, 3, C)`` (vector) and ``(E, C)`` (edge).
    """

    address: str
    kind: Kind
    channels: int
    description: str
    #: ``(C,)``, the weights of the linear head that makes an output of this feature, where the
    #: model has one: energies of atoms of a node feature, forces of a vector feature
    readout: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> str:
        """The shape in words, such as ``(N, 128)``, with N atoms and E directed edges."""
        leading = {"node": "N", "vector": "N, 3", "edge": "E"}[self.kind]
        return f"({leading}, {self.channels})"


@dataclass
class Feature:
    """A captured feature.

    ``values`` is ``(N, C)`` (node), ``(N, 3, C)`` (vector) or ``(E, C)`` (edge). For edges also:

    - ``edge_index`` ``(2, E)``: row 0 the source, row 1 the target atom;
    - ``edge_vectors`` ``(E, 3)``: unit vectors from the source to the target, whatever the
      model's own convention is;
    - ``cell_offsets`` ``(E, 3)``: the source is the image at ``pos[source] + cell_offsets @ cell``,
      as in fairchem's ``data.cell_offsets``.
    """

    spec: FeatureSpec
    values: Tensor
    edge_index: Tensor | None = None
    edge_vectors: Tensor | None = None
    cell_offsets: Tensor | None = None


class Request(NamedTuple):
    """A feature address, and the form in which it is wanted.

    The form equals the feature's kind, but for edge features, which can also be had summed onto
    their target atoms: as "node" ``(N, C)``, or weighted with the edges' unit vectors, as "vector"
    ``(N, 3, C)``.
    """

    address: str
    form: Kind


#: A model's edges themselves, ``(E, 5)`` whole numbers: source, target, and the source's cell
#: offset along the three axes (as `Feature.cell_offsets`). Edge features have a row for each.
GRAPH = Request("graph", "edge")


def atom_energy(output: str) -> Request:
    """The shares that atoms have in an output of a structure, by its name."""
    return Request(_ATOMS if output == "energy" else f"{_ATOMS}@{output}", "node")


def output_of(request: Request, energy: str | None) -> str | None:
    """The output that a request wants the atoms' shares in; None for any other feature.

    Args:
        request: any.
        energy: the output that a model's ``atom_energy`` is of.
    """
    name, _, output = request.address.partition("@")
    return None if name != _ATOMS else output or energy


def parse_address(address: str) -> list[str]:
    """Split ``node@1+3`` into the single addresses ``node@1`` and ``node@3``.

    Raises:
        UserError: if it does not read ``<feature>[@<layer>[+<layer>...]]``, or names a layer twice.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if isinstance(address, str) and _OF_OUTPUT.fullmatch(address):
        return [address]
    if match is None:
        raise UserError(
            f"feature address {address!r} does not read <feature>[@<layer>[+<layer>...]], "
            "for example node, edge@2 or node@1+3"
        )
    if match["layers"] is None:
        return [match["name"]]
    layers = [int(layer) for layer in match["layers"].split("+")]
    if len(set(layers)) < len(layers):
        raise UserError(f"feature address '{address}' names a layer twice; name each layer once")
    return [f"{match['name']}@{layer}" for layer in layers]


def summarise_addresses(addresses: Iterable[str]) -> str:
    """``node, node@0..3, atom_energy``: every address, with runs of layers folded."""
    layers: dict[str, list[int]] = {}
    words: dict[str, None] = {}
    for address in addresses:
        name, _, layer = address.partition("@")
        numbered = layer.isdigit()
        words[f"{name}@" if numbered else address] = None
        if numbered:
            layers.setdefault(name, []).append(int(layer))

    def fold(word: str) -> str:
        if not word.endswith("@"):
            return word
        first, last = min(layers[word[:-1]]), max(layers[word[:-1]])
        return f"{word}{first}" if first == last else f"{word}{first}..{last}"

    return ", ".join(fold(word) for word in words)
