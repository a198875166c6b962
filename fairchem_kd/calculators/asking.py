"""Asking an ASE calculator about one structure, and what a store keeps of its answer.

Outputs are ``energy`` (eV) and ``forces`` (eV/Å). Where its results have ``energies``, (N,), that
add up to the energy, those are kept as what atoms give to it. Features are whatever else is named:
an array of its ``results``, ``(N, C)`` of scalars or ``(N, 3, C)`` of vectors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ase
import numpy as np

from fairchem_kd.calculators.factory import Factory
from fairchem_kd.errors import UserError
from fairchem_kd.store.format import Array, Column, Structure
from fairchem_kd.store.names import (
    ENERGY,
    FORCES,
    atom_energy_column,
    feature_column,
    output_column,
)

#: Å: a structure without an image nearer than that along any axis is a molecule.
ISOLATED = 20.0
#: eV per atom by which atoms' energies may miss the structure's.
_MISSED = 1e-3
_STILL = 1e-5  # Å by which atoms may move while a calculator is asked
#: By the name of a feature, the form in which it is kept.
_FORMS = {"node": "node", "vector": "vector", "edge": "node"}
_ADDRESS = re.compile(r"(node|vector|edge)(@\d+)?")
_ATOM_ENERGY = "atom_energy"


class NoAnswer(UserError):
    """A calculator could say nothing of a structure; why is in the message."""


def parse_features(given: Sequence[str]) -> dict[str, str]:
    """``node``, ``vector@2=KEY``, ... as keys of a calculator's results by address.

    Without ``=KEY`` the key is the address with ``_features`` behind it: ``node_features``.

    Raises:
        UserError: an address of another form, one twice, or an empty key.
    """
    features: dict[str, str] = {}
    for one in given:
        address, equals, key = one.partition("=")
        if not _ADDRESS.fullmatch(address) or (equals and not key):
            raise UserError(
                f"--features {one}: of a calculator give ADDRESS or ADDRESS=KEY, where ADDRESS is "
                "node, vector, edge (summed onto atoms) or such with a layer, node@2, and KEY is "
                "its name in the calculator's results."
            )
        if address in features:
            raise UserError(f"--features has {address} twice: give it once.")
        features[address] = key or f"{address}_features"
    return features


def as_atoms(structure: Structure) -> ase.Atoms:
    """What a calculator sees: periodic along all axes, or a molecule.

    A store's structures are periodic everywhere, with room along axes that were not. One with room
    along all of them is a molecule, and keeps its cell, which some calculators want all the same.
    Axes are not told apart otherwise, since some calculators refuse mixed periodicity.
    """
    pos = np.asarray(structure.pos, np.float64)
    cell = np.asarray(structure.cell, np.float64).reshape(3, 3)
    tags = None if structure.tags is None else np.maximum(structure.tags, 0)
    said = structure.pbc is None or bool(np.any(np.asarray(structure.pbc) > 0))
    periodic = said and not _isolated(pos, cell)
    return ase.Atoms(structure.numbers, pos, cell=cell, pbc=periodic, tags=tags)


def _isolated(pos: Array, cell: Array) -> bool:
    """Whether no image is nearer than `ISOLATED` along any axis of the cell."""
    if abs(np.linalg.det(cell)) < 1e-9:
        return True
    for axis in range(3):
        normal = np.cross(cell[axis - 2], cell[axis - 1])
        normal /= np.linalg.norm(normal)
        height = abs(cell[axis] @ normal)
        if height - (np.ptp(pos @ normal) if len(pos) else 0.0) < ISOLATED:
            return False
    return True


def rounded(structure: Structure) -> Structure:
    """To the precision to which a store knows it, so that what is asked is what is kept."""
    return Structure(
        np.asarray(structure.numbers, "<u1"),
        np.asarray(structure.pos, "<f4"),
        np.asarray(structure.cell, "<f4").reshape(3, 3),
        structure.pbc,
        structure.tags,
    )


def shown(structure: Structure) -> bytes:
    """16 bytes of all that a calculator sees of a structure, by which an answer is known again."""
    atoms = as_atoms(rounded(structure))
    digest = hashlib.blake2b(len(atoms).to_bytes(8, "little"), digest_size=16)
    for part in (atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc, atoms.get_tags()):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()


#: Finds what a calculator has said of a structure before, by column; None: nothing is known.
Recall = Callable[[Structure], Mapping[str, Array] | None]


class Calculator:
    """An ASE calculator that is asked about structures one by one.

    Args:
        factory: what makes it.
        features: under which key of its results each feature is, by address.

    Raises:
        UserError: it cannot be made, or gives no energies or no forces.
    """

    def __init__(self, factory: Factory, features: Mapping[str, str] | None = None) -> None:
        self.factory = factory
        self.features = dict(features or {})
        self.ase = factory.make()
        #: of what it answers; known from its first answer on
        self.columns: tuple[Column, ...] | None = None
        #: is looked up before it is asked what a store keeps of an answer
        self.recall: Recall | None = None

    @property
    def wanted(self) -> list[str]:
        """The columns that every record of its store has, as far as that is known before."""
        return [
            output_column(ENERGY),
            output_column(FORCES),
            *(feature_column(address, _form(address)) for address in self.features),
        ]

    def raw(self, structure: Structure) -> tuple[float, Array]:
        """Energy, eV, and forces, eV/Å, ``(N, 3)``, at positions of any precision.

        Raises:
            NoAnswer: it fails, or what it says is none of this.
        """
        exact = np.array_equal(np.asarray(structure.pos, "<f4"), structure.pos)
        if exact and (known := self._recalled(structure)) is not None:
            return float(known[output_column(ENERGY)][0]), known[output_column(FORCES)]
        energy, forces, _ = self._results(structure)
        return energy, forces

    def ask(self, structure: Structure) -> dict[str, Array]:
        """What a store keeps of its answer, by column.

        Raises:
            NoAnswer: it fails, or says something else than of the structures before.
        """
        structure = rounded(structure)
        values = self._recalled(structure) or self.values(structure)
        if self.columns is None:
            self.columns = tuple(_column_of(name, value) for name, value in values.items())
        if self.columns != tuple(_column_of(name, value) for name, value in values.items()):
            raise NoAnswer("it gives other things than of the structures before")
        return values

    def values(self, structure: Structure) -> dict[str, Array]:
        """As :meth:`ask`, at positions of any precision, and of this structure alone.

        Raises:
            NoAnswer: it fails, or lacks a feature that is asked for.
        """
        energy, forces, results = self._results(structure)
        atoms = len(structure.numbers)
        values: dict[str, Array] = {
            output_column(ENERGY): np.array([energy]),
            output_column(FORCES): forces,
        }
        shares = self._shares(results, energy, atoms)
        if shares is not None:
            values[atom_energy_column(ENERGY)] = shares
            values[feature_column(_ATOM_ENERGY, "node")] = shares
        for address, key in self.features.items():
            values[feature_column(address, _form(address))] = _feature(results, address, key, atoms)
        return values

    def _recalled(self, structure: Structure) -> dict[str, Array] | None:
        """What it said before, where that is all that is kept; None: it has to be asked."""
        known = None if self.recall is None else self.recall(structure)
        if known is None:
            return None
        names = self.wanted if self.columns is None else [column.name for column in self.columns]
        if not set(names) <= known.keys():
            return None
        return dict(known) if self.columns is None else {name: known[name] for name in names}

    def _results(self, structure: Structure) -> tuple[float, Array, Mapping[str, Any]]:
        atoms = as_atoms(structure)
        given = atoms.copy()
        atoms.calc = self.ase
        try:
            forces = _numbers(atoms.get_forces(), "forces")
            energy = _numbers(atoms.get_potential_energy(), "energy")
            results: Mapping[str, Any] = dict(getattr(self.ase, "results", None) or {})
        except NoAnswer:
            raise
        except Exception as error:  # each calculator fails in its own way
            reset = getattr(self.ase, "reset", None)
            if callable(reset):
                reset()  # what it began must not pass for an answer
            lines = str(error).strip().splitlines() or [""]
            raise NoAnswer(f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")) from error
        _refuse_changed(given, atoms)
        if energy.size != 1:
            raise NoAnswer(f"its energy has the shape {energy.shape}")
        if forces.shape != (len(atoms), 3):
            raise NoAnswer(f"its forces have the shape {forces.shape}, not ({len(atoms)}, 3)")
        return float(energy.reshape(-1)[0]), forces, results

    def _shares(self, results: Mapping[str, Any], energy: float, atoms: int) -> Array | None:
        """What atoms give to the energy, ``(N, 1)``; None where it does not say."""
        expected = self.columns is None or any(
            column.name == atom_energy_column(ENERGY) for column in self.columns
        )
        if not expected or results.get("energies") is None:
            return None
        shares = np.array(_plain(results["energies"]), np.float64)
        fitting = shares.shape in ((atoms,), (atoms, 1)) and np.isfinite(shares).all()
        if not fitting or abs(shares.sum() - energy) > _MISSED * max(atoms, 1):
            return None
        return shares.reshape(atoms, 1)


def _refuse_changed(given: ase.Atoms, atoms: ase.Atoms) -> None:
    """Refuse the answer of a calculator that has changed the atoms that it was given.

    It is one about other atoms then. Whole structures may be moved, and atoms by whole edges of the
    cell, as where they are wrapped into it.

    Raises:
        NoAnswer: saying what has changed.
    """
    if not np.array_equal(given.numbers, atoms.numbers):
        raise NoAnswer("it changes which atoms there are, or their order, in what it is given")
    if np.abs(np.array(given.cell) - np.array(atoms.cell)).max() > _STILL and given.pbc.any():
        raise NoAnswer("it changes the cell that it is given")
    moved = atoms.positions - given.positions
    if not moved.any():
        return
    moved = moved - moved[0]
    if given.pbc.any():
        cell = np.array(given.cell)
        moved -= np.round(moved @ np.linalg.inv(cell)) @ cell
    farthest = float(np.linalg.norm(moved, axis=1).max())
    if not farthest < _STILL:
        raise NoAnswer(f"it moves the atoms that it is given, by {farthest:.2g} Å")


def _form(address: str) -> str:
    return _FORMS[address.partition("@")[0]]


def _column_of(name: str, values: Array) -> Column:
    """The column of values: an energy's is of the structure, all else of atoms."""
    of_structure = name == output_column(ENERGY)
    shape = values.shape if of_structure else values.shape[1:]
    dtype = "<f4" if name.startswith("feature:") else "<f8"
    return Column(name, "structure" if of_structure else "atom", tuple(shape), dtype)


def _feature(results: Mapping[str, Any], address: str, key: str, atoms: int) -> Array:
    if results.get(key) is None:
        known = ", ".join(sorted(map(str, results))) or "nothing"
        raise NoAnswer(f"its results have no '{key}' (they have {known})")
    values = _numbers(results[key], key)
    of_vectors = _form(address) == "vector"
    dimensions = 3 if of_vectors else 2
    fitting = values.ndim == dimensions and values.shape[0] == atoms and values.size
    if not fitting or (of_vectors and values.shape[1] != 3):
        expected = f"({atoms}, 3, C)" if of_vectors else f"({atoms}, C)"
        raise NoAnswer(f"'{key}' of its results has the shape {values.shape}, not {expected}")
    return values


def _plain(value: Any) -> Any:
    """A tensor as an array."""
    for step in ("detach", "cpu", "numpy"):
        if callable(getattr(value, step, None)):
            value = getattr(value, step)()
    return value


def _numbers(value: Any, name: str) -> Array:
    """As ``float64``.

    Raises:
        NoAnswer: there are none, or some are not finite.
    """
    try:
        values = np.array(_plain(value), np.float64)  # a copy: EMT, for one, uses its arrays again
    except (TypeError, ValueError):
        raise NoAnswer(f"its {name} is no array of numbers") from None
    if not np.isfinite(values).all():
        raise NoAnswer(f"its {name} is not finite")
    return values
