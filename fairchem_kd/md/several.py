"""What a calculator says of several structures, and which of them it fails on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ase.calculators.calculator import CalculationFailed

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


def ask_several(
    calculator: Calculator, structures: Sequence[Atoms]
) -> list[dict[str, Any] | CalculationFailed]:
    """Energies and forces of each structure, or why there are none.

    All are asked about at once where the calculator can
    (:meth:`~fairchem_kd.StudentCalculator.calculate_batch`). If it fails, one of them is why: it
    shows which by asking about halves.

    Args:
        calculator: of ASE.
        structures: of any size.

    Returns:
        For each its ``energy`` (eV) and ``forces`` (eV/Å, ``(N, 3)``, of fixed atoms too), neither
        of which knows of constraints; or what was raised about it.
    """
    together = getattr(calculator, "calculate_batch", None)
    if together is None:
        return [_ask_one(calculator, atoms) for atoms in structures]
    try:
        return list(together(structures))
    except CalculationFailed as error:
        if len(structures) == 1:
            return [error]
    half = len(structures) // 2
    parts = (structures[:half], structures[half:])
    return [answer for part in parts for answer in ask_several(calculator, part)]


def _ask_one(calculator: Calculator, atoms: Atoms) -> dict[str, Any] | CalculationFailed:
    asked = atoms.copy()
    asked.set_constraint()  # some have energies and forces of their own, which the caller adds
    asked.calc = calculator
    try:
        return {"energy": asked.get_potential_energy(), "forces": asked.get_forces()}
    except CalculationFailed as error:
        return error
