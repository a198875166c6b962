"""The seam between distillation and what teaches: a question, and a frozen answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fairchem_kd.features import GRAPH, Request
from fairchem_kd.teachers.edges import pick_edges, systems_of

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.features import FeatureSpec


@dataclass(frozen=True)
class Taught:
    """What a teacher says of the B structures, N atoms in all, of one batch; detached."""

    natoms: Tensor  #: ``(B,)``: the rows of atoms go by structure, in the batch's order
    #: float64, by name, in the units of its labels: ``(B, C)`` of structures, ``(N, C)`` of atoms;
    #: energies ``(B, 1)`` in eV, forces ``(N, 3)`` in eV/Å
    outputs: Mapping[str, Tensor]
    #: ``(N, C)`` or ``(N, 3, C)``, by request; ``(E, C)`` in the form edge, with `GRAPH` ``(E, 5)``
    features: Mapping[Request, Tensor]
    #: ``(N, 1)``, float64, what atoms give to an output of a structure, where it was requested
    atom_energies: Mapping[str, Tensor] = field(default_factory=dict)
    trusted: Tensor | None = None  #: ``(B,)``, true where it can be relied on; None: everywhere
    origin: str = ""  #: who says so
    #: ``(B,)`` by output, in its units, how far those are apart of whom this is the mean, the rms
    #: over a structure; empty where one alone speaks
    spread: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, structures: Sequence[int]) -> Taught:
        """What is said of some of the structures, in the order in which they are named."""
        chosen = torch.as_tensor(structures, dtype=torch.long, device=self.natoms.device)
        stops = self.natoms.cumsum(0)
        atoms = torch.cat(
            [
                torch.arange(int(stops[i] - self.natoms[i]), int(stops[i]), device=stops.device)
                for i in chosen.tolist()
            ]
        )
        systems, total = len(self.natoms), int(stops[-1])

        def rows(values: Tensor) -> Tensor:
            # one row a structure or one an atom; the same number means structures of one atom
            assert len(values) in (systems, total)
            return values[chosen] if len(values) == systems else values[atoms]

        return Taught(
            self.natoms[chosen],
            {name: rows(values) for name, values in self.outputs.items()},
            self._features_of(structures, atoms),
            {name: values[atoms] for name, values in self.atom_energies.items()},
            None if self.trusted is None else self.trusted[chosen],
            self.origin,
            {name: values[chosen] for name, values in self.spread.items()},
        )

    def _features_of(self, structures: Sequence[int], atoms: Tensor) -> dict[Request, Tensor]:
        """The features of some structures, whose atoms are named too."""
        found = {r: v[atoms] for r, v in self.features.items() if r.form != "edge"}
        if GRAPH in self.features:
            edges, graph = pick_edges(self.features[GRAPH], self.natoms, structures)
            found |= {r: v[edges] for r, v in self.features.items() if r.form == "edge"}
            found[GRAPH] = graph
        return {request: found[request] for request in self.features}

    def sound(self, outputs: Iterable[str]) -> Taught:
        """Itself; or where anything is not finite, an answer that does not trust that structure.

        What is not finite becomes 0, since what does not count must not spoil gradients either
        (0 times NaN is NaN). On a CPU an answer without such values comes back as it is.

        Args:
            outputs: those that are looked at, beside all features.
        """
        values = [self.outputs[name] for name in outputs]
        values += [v for r, v in self.features.items() if r.form != "edge"]
        values += self.atom_energies.values()
        of_edges = [v for r, v in self.features.items() if r.form == "edge" and r != GRAPH]
        if not self.natoms.is_cuda and all(
            bool(torch.isfinite(v).all()) for v in (*values, *of_edges)
        ):
            return self
        systems = len(self.natoms)
        of = torch.repeat_interleave(torch.arange(systems, device=self.natoms.device), self.natoms)
        wrong = torch.zeros(systems, device=self.natoms.device)
        for value in values:
            rows = (~torch.isfinite(value)).flatten(1).any(1).to(wrong)
            wrong = wrong + rows if len(rows) == systems else wrong.index_add(0, of, rows)
        for value in of_edges:
            rows = (~torch.isfinite(value)).flatten(1).any(1).to(wrong)
            wrong = wrong.index_add(0, systems_of(self.features[GRAPH], self.natoms), rows)
        trusted = wrong == 0 if self.trusted is None else self.trusted & (wrong == 0)

        def clean(value: Tensor) -> Tensor:
            return torch.where(torch.isfinite(value), value, 0)

        return Taught(
            self.natoms,
            {name: clean(value) for name, value in self.outputs.items()},
            {request: clean(value) for request, value in self.features.items()},
            {name: clean(value) for name, value in self.atom_energies.items()},
            trusted,
            self.origin,
            {name: clean(value) for name, value in self.spread.items()},
        )


class Teacher(Protocol):
    """Whatever can teach."""

    @property
    def identity(self) -> str:
        """A digest of what it says: two teachers with the same one say the same."""

    @property
    def levels(self) -> Mapping[str, str]:
        """``system`` or ``atom``, by output that it gives."""

    @property
    def energy_name(self) -> str | None:
        """The output that its ``atom_energy`` is of; None where it has none, or several."""

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        """What the features are.

        Raises:
            UserError: one that it does not have.
        """

    def require_outputs(self, names: Iterable[str]) -> None:
        """Make sure that it gives all of them.

        Raises:
            UserError: naming the first that it does not give.
        """

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse atoms, ``(N,)``, that it knows nothing about.

        Raises:
            UserError: naming the elements.
        """

    def teach(self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        """What it says of a batch, which stays as it was: all outputs, and these features.

        With ``outputs`` false outputs may be left out, where that is faster.
        """


class Asked(Teacher, Protocol):
    """Whose answers a store keeps: a teacher that says what its answers depend on."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def digest(self) -> str:
        """Of all that its answers depend on."""

    @property
    def precision(self) -> str:
        """In which it computes."""

    @property
    def is_here(self) -> bool:
        """Whether it can be asked about what the store lacks."""

    def spread(self, output: str) -> float | None:
        """By how much an output of structures varies, where it says so."""
