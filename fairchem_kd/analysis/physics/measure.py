"""Whether a model behaves as a potential: relaxations, forces against the energy, bond scans.

Every measurement takes an ASE calculator, a stock model's or the labels' method's, and starting
structures; fixed atoms stay fixed. What is random is drawn from a seed, the same for every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import CalculationFailed
from ase.data import covalent_radii
from ase.geometry import find_mic
from ase.optimize import BFGS
from numpy.typing import NDArray

from fairchem_kd.stock.constraints import held

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

Array = NDArray[np.float64]

BONDED = 1.25  #: of the sum of two covalent radii; nearer pairs are bonded


@dataclass(frozen=True)
class Relaxation:
    """One relaxation; the differences are to the labels' method, None where it is not at hand.

    ``energy_above`` (eV): of the end of the relaxation over where the method's own one ends, both
    energies the method's. ``displacement`` (Å): root mean square distance of the free atoms from
    there.
    """

    converged: bool
    steps: int
    energy_above: float | None = None
    displacement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def relax(
    calculator: Calculator, atoms: Atoms, *, fmax: float = 0.05, steps: int = 100
) -> tuple[Relaxation, Atoms]:
    """Relax ``atoms`` by BFGS until no force exceeds ``fmax`` (eV/Å); and where that led."""
    system = atoms.copy()
    system.calc = calculator
    optimiser = BFGS(system, logfile=None)
    with warnings.catch_warnings():  # of an optimiser that meets values that are not finite
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            converged = bool(optimiser.run(fmax=fmax, steps=steps))
        except (ValueError, np.linalg.LinAlgError, CalculationFailed):
            converged = False
    return Relaxation(converged, optimiser.get_number_of_steps()), system


def against(relaxation: Relaxation, end: Atoms, method: Calculator, best: Atoms) -> Relaxation:
    """The relaxation with its differences to ``best``, the method's own relaxed structure."""
    if not np.isfinite(end.positions).all():
        return relaxation
    energies = []
    for system in (end, best):
        copy = system.copy()
        copy.calc = method
        try:
            energies.append(float(copy.get_potential_energy()))
        except CalculationFailed:
            return relaxation
    moved, _ = find_mic(end.positions - best.positions, best.cell, best.pbc)
    moved = moved[free_atoms(best)]
    return Relaxation(
        relaxation.converged,
        relaxation.steps,
        energies[0] - energies[1],
        float(np.sqrt(np.mean(np.sum(np.square(moved), axis=1)))),
    )


def free_atoms(atoms: Atoms) -> NDArray[np.int64]:
    """The indices of the atoms that may move."""
    return np.flatnonzero(held(atoms)[0] == 0)


@dataclass(frozen=True)
class Consistency:
    """Forces along random directions against differences of the energy, both ``(K,)`` in eV/Å."""

    forces: list[float]
    differences: list[float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_forces(
    calculator: Calculator, atoms: Atoms, *, directions: int = 3, step: float = 0.02, seed: int = 0
) -> Consistency:
    """Compare forces with central differences of the energy.

    Along random directions of all free atoms together: a displacement of length ``step`` (Å) for
    each atom on average, large enough for a model in fp32. The forces are projected on the
    direction, of which every atom has length 1 on average. Nothing where no atom is free.
    """
    rng = np.random.default_rng(seed)
    free = free_atoms(atoms)
    if not len(free):
        return Consistency([], [])
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    forces = np.array(system.get_forces())
    found, differences = [], []
    for _ in range(directions):
        direction = np.zeros_like(system.positions)
        direction[free] = rng.normal(size=(len(free), 3))
        direction *= np.sqrt(len(free)) / np.linalg.norm(direction)
        energies = []
        for sign in (1, -1):
            system.positions = atoms.positions + sign * step * direction
            energies.append(float(system.get_potential_energy()))
        per_atom = np.sqrt(len(free))  # so that values do not grow with the structure
        found.append(float(np.sum(forces * direction)) / per_atom)
        differences.append(-(energies[0] - energies[1]) / (2 * step) / per_atom)
    return Consistency(found, differences)


@dataclass(frozen=True)
class Scan:
    """Energy (eV) and force along a bond (eV/Å) while one of its atoms is moved along it."""

    bond: str  #: such as ``O-H``
    lengths: list[float]  #: Å
    energies: list[float]
    forces: list[float]  #: on the moved atom, positive where it pushes outwards

    @property
    def turns(self) -> int:
        """How often the energy turns from falling to rising or back: 1 for a single well."""
        slopes = np.sign(np.diff(self.energies))
        slopes = slopes[slopes != 0]
        return int(np.sum(slopes[1:] != slopes[:-1]))

    @property
    def mismatch(self) -> float:
        """Mean absolute difference of the force and of minus the slope of the energy, eV/Å."""
        slope = np.gradient(self.energies, self.lengths, edge_order=2)
        return float(np.mean(np.abs(np.array(self.forces) + slope)[1:-1]))

    def error(self, other: Scan) -> float:
        """Mean absolute difference of two energy curves, each counted from its lowest, in eV."""
        one, two = np.array(self.energies), np.array(other.energies)
        return float(np.mean(np.abs((one - one.min()) - (two - two.min()))))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "turns": self.turns, "mismatch": self.mismatch}


def find_bond(atoms: Atoms) -> tuple[int, int] | None:
    """The tightest bond, one atom of which can be moved: (the one that stays, the moved).

    Tight by the distance over the sum of covalent radii. Atoms at the end of a molecule, with one
    neighbour alone, come first, so that a scan meets no other atom; else the lighter one is moved.
    The moved atom is free and of the highest tag that a free atom has: on a slab, of the adsorbate.
    None where there is no such pair.
    """
    if len(atoms) < 2:
        return None
    radii = covalent_radii[atoms.numbers]
    tightness = atoms.get_all_distances(mic=True) / (radii[:, None] + radii)
    np.fill_diagonal(tightness, np.inf)
    free = free_atoms(atoms)
    tags = atoms.get_tags()
    movable = free[tags[free] == tags[free].max()].tolist() if len(free) else []
    neighbours = (tightness < BONDED).sum(axis=1)

    def rank(stays: int, moves: int) -> int:
        at_the_end = neighbours[moves] == 1 and tightness[stays, moves] < BONDED
        lighter = atoms.numbers[moves] <= atoms.numbers[stays]
        return (0 if lighter else 1) if at_the_end else (2 if lighter else 3)

    ranked = [
        (rank(stays, moves), tightness[stays, moves], stays, moves)
        for moves in movable
        for stays in range(len(atoms))
        if stays != moves
    ]
    best = min(ranked, default=None)
    return None if best is None or best[0] == 3 else best[2:]


def scan_bond(
    calculator: Calculator,
    atoms: Atoms,
    bond: tuple[int, int],
    *,
    points: int = 25,
    reach: Sequence[float] = (0.85, 1.35),
) -> Scan:
    """Move one atom of a bond along it, all others at rest.

    Args:
        calculator: what gives energies and forces.
        atoms: the structure.
        bond: as :func:`find_bond` gives it.
        points: lengths, evenly spread.
        reach: the shortest and the longest, in units of the length that the bond has.
    """
    stays, moves = bond
    system = atoms.copy()
    system.set_constraint()
    system.calc = calculator
    vector = system.get_distance(stays, moves, mic=True, vector=True)
    length = np.linalg.norm(vector)
    axis = vector / length
    start = system.positions[moves] - vector
    lengths = np.linspace(reach[0] * length, reach[1] * length, points)
    energies, forces = [], []
    for length in lengths:
        system.positions[moves] = start + length * axis
        energies.append(float(system.get_potential_energy()))
        forces.append(float(system.get_forces()[moves] @ axis))
    name = f"{system.symbols[stays]}-{system.symbols[moves]}"
    return Scan(name, lengths.tolist(), energies, forces)
