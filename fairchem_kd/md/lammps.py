"""A student in LAMMPS, through its Python interface: ``fix external`` asks an ASE calculator.

LAMMPS integrates, thermostats and writes; at every step it asks for energy, forces and, where the
calculator has the stress, the virial. One process, all atoms at once: there is no domain
decomposition. Needs the ``lammps`` package, numpy and ASE.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers
from numpy.typing import NDArray

from fairchem_kd.errors import UserError

_VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # LAMMPS' order, which is not ASE's


class LammpsStudent:
    """Has a LAMMPS instance take its forces from a calculator.

        lmp = lammps.lammps()
        lmp.commands_string(...)  # units metal, the box, the atoms, masses, and an integrator
        LammpsStudent(lmp, ModuleCalculator("student.pt2"), ["Cu", "O"]).run(1000)

    Energy and virial count in LAMMPS' own (``pe``, ``press``). Forces of a pair style, of which
    ``zero`` has none, are added to.

    Args:
        lmp: with its atoms, of ``units metal``, on one process.
        calculator: any ASE calculator, such as ``ModuleCalculator`` and ``StudentCalculator``.
        elements: of atom types 1, 2, ...
        fix: the ID of the ``fix external`` that is made.

    Raises:
        UserError: the instance is none that this can drive.
    """

    def __init__(
        self, lmp: Any, calculator: Calculator, elements: Sequence[str], fix: str = "student"
    ) -> None:
        self.lmp, self.calculator, self.fix = lmp, calculator, fix
        unknown = [one for one in elements if atomic_numbers.get(one, 0) < 1]
        if isinstance(elements, str) or unknown:
            raise UserError(
                f"elements is {elements!r}, and has to be symbols of elements, one an atom type."
            )
        self._numbers = np.array([0, *(atomic_numbers[one] for one in elements)])
        self._check()
        self.with_virial = "stress" in calculator.implemented_properties
        self.error: Exception | None = None  #: what stopped the last run
        why = "" if np.all(lmp.extract_box()[5]) else "the box is not periodic along all axes"
        if why := why if self.with_virial else "the model has no stress":
            logging.warning(
                f"Pressures in LAMMPS are without the student's part, since {why}: let nothing "
                "depend on them, such as fix npt or fix box/relax."
            )
        self._atoms = Atoms(calculator=calculator)
        lmp.command(f"fix {fix} all external pf/callback 1 1")
        lmp.command(f"fix_modify {fix} energy yes virial {'yes' if self.with_virial else 'no'}")
        lmp.set_fix_external_callback(fix, self._callback, None)

    def _check(self) -> None:
        lmp, types = self.lmp, len(self._numbers) - 1
        units = lmp.extract_global("units")
        if units != "metal":
            raise UserError(
                f"LAMMPS is in units {units}, and the calculator in eV and Å: begin with "
                "`units metal`."
            )
        if (world := lmp.extract_setting("world_size")) > 1:
            raise UserError(
                f"LAMMPS runs on {world} processes, and a student needs all atoms in one: start it "
                "without mpirun."
            )
        if (there := lmp.extract_setting("ntypes")) != types:
            raise UserError(
                f"LAMMPS has {there} atom types, and elements names {types}: name one for each."
            )
        if not lmp.get_natoms():
            raise UserError("LAMMPS has no atoms: make them before the student is given to it.")

    def run(self, steps: int) -> None:
        """LAMMPS' ``run``.

        Raises:
            UserError: the calculator has no answer, ``Exploded`` for example; what LAMMPS wrote up
                to there is whole.
        """
        self.error = None
        self.lmp.command(f"run {int(steps)}")
        if self.error is not None:
            raise self.error

    def _callback(
        self,
        _: Any,
        step: int,
        local: int,
        tags: NDArray[Any],
        positions: NDArray[np.float64],
        forces: NDArray[np.float64],
    ) -> None:
        """As ``fix external`` calls it, which would go on past an error."""
        if self.error is None:
            try:
                self._answer(local, tags, positions, forces)
                return
            except Exception as error:
                self.error = error
                print(f"step {step}: {error}", flush=True)
        forces[:local] = 0.0
        self.lmp.force_timeout()  # a soft stop, since no exception passes through LAMMPS

    def _answer(
        self,
        local: int,
        tags: NDArray[Any],
        positions: NDArray[np.float64],
        forces: NDArray[np.float64],
    ) -> None:
        order = np.argsort(np.ravel(tags)[:local])  # LAMMPS sorts its atoms anew now and then
        types = np.ravel(self.lmp.numpy.extract_atom("type"))[:local]
        numbers = self._numbers[types[order]]
        low, high, xy, yz, xz, periodic, _ = self.lmp.extract_box()
        size = np.subtract(high, low)
        cell = np.array([[size[0], 0, 0], [xy, size[1], 0], [xz, yz, size[2]]])
        atoms = self._atoms
        if not np.array_equal(atoms.numbers, numbers):
            atoms = self._atoms = Atoms(numbers=numbers, calculator=self.calculator)
        atoms.set_cell(cell)
        atoms.pbc = np.array(periodic, bool)
        atoms.positions[:] = positions[:local][order] - low
        forces[order] = atoms.get_forces()
        self.lmp.fix_external_set_energy_global(self.fix, float(atoms.get_potential_energy()))
        if self.with_virial:
            virial = np.zeros(6)
            if atoms.pbc.all():
                stress = atoms.get_stress(voigt=False)
                virial = np.array([-stress[place] for place in _VOIGT]) * atoms.get_volume()
            self.lmp.fix_external_set_virial_global(self.fix, virial.tolist())
