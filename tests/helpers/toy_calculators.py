"""ASE calculators to teach with: EMT, and what can be wrong with one."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT


class Toy(EMT):
    """EMT with an energy for each atom of an element, times a factor, and with features.

    Args:
        energy: factor of the energies.
        forces: factor of the forces.
        shift: eV for each atom of copper.
        fails: atomic number of an element on which it fails; -1: of any.
        not_finite: the same, with energies that are not finite.
        with_features: whether its results have any.
        shares: whether it says what atoms give to the energy.
    """

    def __init__(
        self,
        energy: float = 1.0,
        forces: float = 1.0,
        shift: float = 0.0,
        fails: int = 0,
        not_finite: int = 0,
        with_features: bool = False,
        shares: bool = True,
    ) -> None:
        super().__init__()
        self.factors = energy, forces
        self.shift, self.fails, self.not_finite = shift, fails, not_finite
        self.with_features, self.shares = with_features, shares

    def calculate(self, atoms: Any = None, properties: Any = ("energy",),
                  system_changes: Any = all_changes) -> None:  # fmt: skip
        if self.fails == -1 or self.fails in atoms.numbers:
            raise RuntimeError("the self-consistent field did not converge\nafter 100 cycles")
        super().calculate(atoms, properties, system_changes)
        energy, forces = self.factors
        more = self.shift * (atoms.numbers == 29)
        self.results["energies"] = energy * (self.results["energies"] + more)
        self.results["energy"] = float(self.results["energies"].sum())
        if self.not_finite in atoms.numbers:
            self.results["energy"] = float("nan")
        self.results["forces"] = forces * self.results["forces"]
        if not self.shares:
            del self.results["energies"]
        if self.with_features:
            distances = atoms.get_all_distances(mic=True) + 1e3 * np.eye(len(atoms))
            weights = np.exp(-distances)
            self.results["node_features"] = np.stack(
                [weights.sum(1), (weights * atoms.numbers).sum(1), atoms.numbers], axis=1
            )
            self.results["arrows"] = self.results["forces"][:, :, None] * np.array([1.0, -2.0])
            self.results["positions"] = atoms.positions.copy()


class WithoutForces(Calculator):
    """It has energies alone."""

    implemented_properties = ["energy"]  # noqa: RUF012


def not_one() -> dict[str, int]:
    """No calculator."""
    return {}
