"""Are a calculator's forces the gradient of its energy, in the same units and with the right sign?

A student learns both from it. Central finite differences along its own forces tell: with a step t
along the unit direction d of all atoms' forces, (E(x - t d) - E(x + t d)) / 2t is their norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fairchem_kd.calculators.asking import Calculator, NoAnswer, rounded
from fairchem_kd.errors import UserError
from fairchem_kd.store.format import Array, Structure

STRUCTURES = 4  # that are looked at
_STEP = 0.01  # Å: how far the atom with the largest force moves
_RATTLE = 0.05  # Å: standard deviation, so that there are forces
_SMALLEST = 2e-3  # eV/Å: root mean square below which forces tell nothing
_ROUNDING = 1e-6  # of an energy in single precision, what is lost of it, and more
_GRADIENT = 0.02  # of their norm, by which forces may miss the differences and be the gradient
_REPEATS = 1e-3  # eV for each atom and eV/Å by which answers about the same structure may differ
_SAME = (0.6, 1.4)  # the ratio of differences to forces where these are direct, say
#: What the ratio is where energies and forces are not in units of each other.
_UNITS = {
    1.8897: "forces in units per Bohr",
    0.5292: "positions in Bohr, or forces times Å per Bohr",
    51.422: "energies in eV and forces in Hartree/Bohr",
    27.211: "energies in eV and forces in Hartree/Å",
    0.03675: "energies in Hartree and forces in eV/Å",
    0.01945: "energies in Hartree/Bohr and forces in eV/Å",
    23.061: "energies in kcal/mol and forces in eV/Å",
    0.04336: "energies in eV and forces in kcal/mol/Å",
    96.485: "energies in kJ/mol and forces in eV/Å",
    0.010364: "energies in eV and forces in kJ/mol/Å",
}


@dataclass(frozen=True)
class ForceCheck:
    """What finite differences showed."""

    structures: int
    ratio: float  #: median of the differences to the forces along themselves
    error: float  #: largest deviation of such a ratio from 1

    def __str__(self) -> str:
        return (
            f"forces against finite differences of the energy, {self.structures} structures: "
            f"ratio {self.ratio:.4f}, off by at most {100 * self.error:.2g} %"
        )

    @property
    def conservative(self) -> bool:
        return self.error <= _GRADIENT


def check_forces(calculator: Calculator, structures: Iterable[Structure]) -> ForceCheck | None:
    """Compare forces with differences of the energy; None where no structure has forces.

    Noise is drawn from a generator of its own.

    Args:
        calculator: is asked three times for each structure.
        structures: of which the first ones that it can be asked about are taken.

    Raises:
        UserError: the sign is wrong, or the units are not those of the energy.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    ratios: list[float] = []
    for structure in structures:
        if len(ratios) == STRUCTURES:
            break
        try:
            ratio = _ratio(calculator, structure, generator)
        except NoAnswer:
            continue
        if ratio is not None:
            ratios.append(ratio)
    if not ratios:
        return None
    found = ForceCheck(
        len(ratios), float(np.median(ratios)), float(np.max(np.abs(np.array(ratios) - 1)))
    )
    least, most = _SAME
    if np.isinf(found.ratio):
        raise UserError(
            f"--calculator {calculator.factory.path}: its forces are zero where its energy changes "
            "with the positions of atoms: take one that gives forces."
        )
    if found.ratio < 0:
        raise UserError(
            f"--calculator {calculator.factory.path}: its forces point uphill: along them its "
            f"energy rises ({found}): give forces, which are minus the gradient."
        )
    if not least <= found.ratio <= most:
        raise UserError(
            f"--calculator {calculator.factory.path}: its forces are not the gradient of its "
            f"energy ({found}){_guess(found.ratio)}: energies must be in eV and forces in eV/Å."
        )
    return found


def _ratio(
    calculator: Calculator, structure: Structure, generator: np.random.Generator
) -> float | None:
    """Of the differences along the forces to their norm; None where there are no forces.

    Infinite where all forces are zero, and the energy changes in some direction.
    """
    pos = np.asarray(structure.pos, np.float64)
    pos = pos + _RATTLE * generator.standard_normal(pos.shape)
    _, forces = calculator.raw(_at(structure, pos))
    norm = float(np.linalg.norm(forces))
    if 0 < norm < _SMALLEST * np.sqrt(forces.size):
        return None
    direction = forces / norm if norm else _any_direction(forces.shape)
    step = _STEP / np.abs(direction).max()
    ahead, _ = calculator.raw(_at(structure, pos + step * direction))
    behind, _ = calculator.raw(_at(structure, pos - step * direction))
    slope = (behind - ahead) / (2 * step)
    if norm:
        return slope / norm
    rounding = _ROUNDING * abs(ahead) / step
    return np.inf if abs(slope) > 10 * _SMALLEST + rounding else None


def _any_direction(shape: tuple[int, ...]) -> Array:
    """A unit vector over all atoms."""
    drawn = np.random.Generator(np.random.PCG64(2)).standard_normal(shape)
    return drawn / np.linalg.norm(drawn)


def check_repeats(calculator: Calculator, structure: Structure) -> list[str]:
    """What it says of a structure when it is asked again, in a sentence; empty where the same.

    Args:
        calculator: is asked about another structure in between, so that it has to work it out anew.
        structure: any; one that it cannot be asked about tells nothing.
    """
    pos = np.asarray(structure.pos, np.float64)
    other = pos + _RATTLE * np.random.Generator(np.random.PCG64(3)).standard_normal(pos.shape)
    try:
        energy, forces = calculator.raw(_at(structure, pos))
        calculator.raw(_at(structure, other))
        again, anew = calculator.raw(_at(structure, pos))
    except NoAnswer:
        return []
    apart, forces_apart = abs(again - energy), float(np.abs(anew - forces).max())
    usual = float(np.sqrt(np.square(forces).mean()))
    same = apart < _REPEATS * len(pos) + _ROUNDING * abs(energy)
    if same and forces_apart < _REPEATS + _GRADIENT * usual:
        return []
    return [
        f"Asked again about the same structure it says something else (by {apart:.2g} eV, and by "
        f"{forces_apart:.2g} eV/Å): a student learns that noise, and `teach verify` will not find "
        "what was kept; have it say the same, by its seed or its settings."
    ]


def _at(structure: Structure, pos: Array) -> Structure:
    return Structure(structure.numbers, pos, structure.cell, structure.pbc, structure.tags)


def _guess(ratio: float) -> str:
    for factor, words in _UNITS.items():
        if abs(ratio / factor - 1) < _GRADIENT:
            return f", as with {words}"
    return ""


def check_turning(calculator: Calculator, structure: Structure) -> list[str]:
    """What is strange about its features when a structure is turned, in sentences; often nothing.

    Scalars stay the same, vectors turn along.

    Args:
        structure: any; one that it cannot be asked about tells nothing.
    """
    if not calculator.features:
        return []
    turn = _rotation(np.random.Generator(np.random.PCG64(1)))
    turned = Structure(
        structure.numbers,
        np.asarray(structure.pos, np.float64) @ turn.T,
        np.asarray(structure.cell, np.float64).reshape(3, 3) @ turn.T,
        structure.pbc,
        structure.tags,
    )
    try:
        before, after = calculator.ask(rounded(structure)), calculator.ask(rounded(turned))
    except NoAnswer:
        return []
    strange = []
    for name in calculator.wanted[2:]:  # after energy and forces
        old, new = before[name], after[name]
        if old.ndim == 3:
            old = np.einsum("ij,njc->nic", turn, old)
        error = float(np.abs(new - old).max() / max(np.sqrt((old**2).mean()), 1e-12))
        if error > 0.05:
            does = "does not turn with" if old.ndim == 3 else "changes when one turns"
            strange.append(
                f"{name} {does} a structure (by {error:.2g} of its root mean square): a student "
                "whose features are equivariant cannot learn that."
            )
    return strange


def _rotation(generator: np.random.Generator) -> Array:
    """A random rotation, ``(3, 3)``."""
    matrix, upper = np.linalg.qr(generator.standard_normal((3, 3)))
    matrix = matrix * np.sign(np.diag(upper))
    return matrix * np.sign(np.linalg.det(matrix))
