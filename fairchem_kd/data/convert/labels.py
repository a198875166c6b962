"""From an ASE structure to a frame of the data set: labels, units, cell, tags, and what is refused.

Energies become eV, forces eV/Å, positions Å. Molecules, which have no cell, go into a large one, so
that models take ``use_pbc: true`` and need no neighbour search of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms, units

from fairchem_kd.data.convert.sources import Part, Structure
from fairchem_kd.data.frames import Array, Frame
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.stock.constraints import held
from fairchem_kd.stock.neighbours import SHORTEST_CUTOFF, without_neighbours
from fairchem_kd.stock.periodicity import tags_of

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": units.Hartree,
    "Rydberg": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
LENGTH_UNITS = {"Angstrom": 1.0, "Bohr": units.Bohr, "nm": 10.0}

#: Å that have to lie between a molecule and its periodic images: the largest published cutoff.
CLEARANCE = 12.0
#: COLL's energy relative to free atoms, beside the total energy.
ATOMIZATION = "atomization_energy"


@dataclass(frozen=True)
class Reading:
    """How structures are to be read."""

    labels: str = "both"  #: both, energy or none
    references: str = "fit"  #: what explains the totals: oc20, atomization, fit, file or none
    group: str = "frame"  #: what a trajectory is: system, file, frame, formula, or a key of info
    energy_key: str | None = None
    forces_key: str | None = None
    energy_unit: str = "eV"
    force_unit: str | None = None  #: ENERGY/LENGTH; by default that of energies and lengths
    length_unit: str = "Angstrom"
    cell: float = 40.0  #: Å, of molecules
    max_force: float | None = None  #: eV/Å: frames with a larger one are left out

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def force_factor(self) -> float:
        """eV/Å of one unit of force."""
        energy, length = self.energy_unit, self.length_unit
        if self.force_unit is not None:
            energy, _, length = self.force_unit.rpartition("/")
        return unit(energy, ENERGY_UNITS, "energy") / unit(length, LENGTH_UNITS, "length")


def unit(name: str, known: Mapping[str, float], what: str) -> float:
    """The factor of a unit.

    Raises:
        UserError: it is not known.
    """
    if name not in known:
        raise UserError(f"'{name}' is no unit of {what} known here{did_you_mean(name, known)}.")
    return known[name]


@dataclass
class Labelled:
    """A frame, and what the split, the sums and the card want to know of it."""

    frame: Frame
    pbc: tuple[bool, bool, bool]
    label: float  #: eV, before references are fitted; NaN without labels
    explained: float  #: eV: what element references are to explain
    forces: Array | None
    group: str
    sid: int
    fid: int
    partly: bool  #: has constraints that leave atoms free in some way, which a data set cannot tell
    alone: bool  #: no atom has a neighbour that a model would see


def label(structure: Structure, part: Part, reading: Reading) -> Labelled | str:
    """The frame of a structure, or why it is left out.

    Raises:
        UserError: labels are missing, or a molecule does not fit the cell.
    """
    atoms, where = structure.atoms, f"{part.file}, frame {structure.frame}"
    if len(atoms) == 0:
        return "no atoms"
    length = unit(reading.length_unit, LENGTH_UNITS, "length")
    positions, cell, pbc = _box(atoms, length, reading.cell, where)
    energy = forces = None
    if reading.labels != "none":
        energy = _energy(atoms, reading, where)
    if reading.labels == "both":
        forces = _forces(atoms, reading, where)
    arrays = [positions, cell, *([] if forces is None else [forces])]
    if not all(np.isfinite(array).all() for array in arrays):
        return "not finite"
    if energy is not None and not np.isfinite(energy):
        return "not finite"
    largest = 0.0 if forces is None else float(np.linalg.norm(forces, axis=1).max())
    if reading.max_force is not None and largest > reading.max_force:
        return "force above the limit"
    fixed, partly = held(atoms)
    frame = Frame(
        numbers=atoms.numbers.astype(np.int64),
        pos=positions.astype(np.float32),
        cell=cell.astype(np.float32),
        tags=_tags(atoms),
        fixed=fixed,
        energy=np.nan if energy is None else energy,
        forces=np.zeros((len(atoms), 3), np.float32) if forces is None else forces.astype("f4"),
    )
    relative, explained = _relative(frame.energy, structure, reading, where)
    group, sid, fid = _identity(structure, part, reading, where)
    alone = without_neighbours(atoms, SHORTEST_CUTOFF / length)
    return Labelled(frame, pbc, relative, explained, forces, group, sid, fid, partly, alone)


def _results(atoms: Atoms) -> dict[str, Any]:
    return dict(atoms.calc.results) if atoms.calc is not None else {}


def _energy(atoms: Atoms, reading: Reading, where: str) -> float:
    """The total energy in eV."""
    given = {**atoms.info, **_results(atoms)}
    key = reading.energy_key or "energy"
    if given.get(key) is None:
        numbers = [k for k, v in given.items() if np.ndim(v) == 0 and not isinstance(v, str)]
        raise UserError(
            f"{where}: there is no energy under '{key}'{did_you_mean(key, numbers)}; name its key "
            "with --energy-key, or take structures alone with --labels none."
        )
    return float(given[key]) * unit(reading.energy_unit, ENERGY_UNITS, "energy")


def _forces(atoms: Atoms, reading: Reading, where: str) -> Array:
    """Forces in eV/Å as the method gave them: constraints are not applied."""
    given = {**atoms.arrays, **_results(atoms)}
    key = reading.forces_key or "forces"
    if given.get(key) is None or np.shape(given[key]) != (len(atoms), 3):
        vectors = [k for k, v in given.items() if np.shape(v) == (len(atoms), 3)]
        known = [name for name in vectors if name != "positions"]
        raise UserError(
            f"{where}: there are no forces under '{key}'{did_you_mean(key, known)}; name their key "
            "with --forces-key, or convert energies alone with --labels energy."
        )
    return np.asarray(given[key], float) * reading.force_factor


def _relative(
    total: float, structure: Structure, reading: Reading, where: str
) -> tuple[float, float]:
    """The label and the part of the total energy that references explain, both in eV."""
    if reading.references == "oc20":
        if structure.reference is None:
            raise UserError(
                f"{where}: its .txt has no reference energy in the third column, so the energy "
                "cannot be made an adsorption energy; take --references none."
            )
        return total - structure.reference, structure.reference
    if reading.references == "atomization":
        given = {**structure.atoms.info, **_results(structure.atoms)}.get(ATOMIZATION)
        if given is None:
            raise UserError(
                f"{where}: it has no {ATOMIZATION}, which other frames have; convert files with "
                "and without it apart, or take --references fit."
            )
        relative = float(given) * unit(reading.energy_unit, ENERGY_UNITS, "energy")
        return relative, total - relative
    return total, total


def _box(
    atoms: Atoms, length: float, side: float, where: str
) -> tuple[Array, Array, tuple[bool, bool, bool]]:
    """Positions ``(N, 3)``, cell ``(3, 3)``, both in Å, and the periodic directions."""
    positions = atoms.positions * length
    if not atoms.pbc.any():
        low, high = positions.min(axis=0), positions.max(axis=0)
        extent = float((high - low).max())
        if np.isfinite(extent) and extent + CLEARANCE > side:
            raise UserError(
                f"{where}: the molecule is {extent:.1f} Å long, so a cell of {side:g} Å leaves "
                f"less than {CLEARANCE:g} Å to its images; give --cell {extent + 2 * CLEARANCE:.0f}"
                " or more."
            )
        return positions + side / 2 - (low + high) / 2, side * np.eye(3), (True, True, True)
    cell = atoms.cell
    if not np.asarray(cell).any(axis=1)[atoms.pbc].all():
        raise UserError(
            f"{where}: it is periodic in a direction without a cell vector; mend its cell."
        )
    return positions, np.array(cell.complete()) * length, tuple(map(bool, atoms.pbc))  # type: ignore[return-value]


def _tags(atoms: Atoms) -> Any:
    """The file's; where it has none, 2 for molecules and 1 elsewhere.

    GemNet-OC's quadruplets are for tags 1 and 2 (its qint_tags), so not every atom may have 0.
    """
    tags = atoms.get_tags()
    if not tags.any():
        tags = tags_of(len(atoms), bool(atoms.pbc.any()))
    return tags.astype(np.int32)


def _identity(
    structure: Structure, part: Part, reading: Reading, where: str
) -> tuple[str, int, int]:
    """The trajectory that a frame belongs to, its number, and the frame's within it."""
    group, frame = reading.group, structure.frame
    if group == "system" and structure.system is not None:
        digits = "".join(c for c in structure.system if c.isdigit())
        sid = int(digits) if digits else _hashed(structure.system)
        return structure.system, sid, frame if structure.fid is None else structure.fid
    if group == "file":
        return str(part.number), part.number, frame
    if group == "frame":
        return f"{part.number}/{frame}", part.number * 10**8 + frame, 0
    if group == "formula":
        name = structure.atoms.get_chemical_formula()
        return name, _hashed(name), frame
    if group not in structure.atoms.info:
        known = list(structure.atoms.info)
        raise UserError(
            f"{where}: --group {group}, but there is no such key{did_you_mean(group, known)}; take "
            "file, frame, formula or a key of every frame."
        )
    value = structure.atoms.info[group]
    sid = int(value) if isinstance(value, (int, np.integer)) else _hashed(str(value))
    return str(value), sid, frame


def _hashed(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
