"""NVE dynamics of structures side by side, and why they end where they do not last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii

from fairchem_kd.md.several import ask_several

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

MAX_FORCE = 100.0  #: eV/Å; more than any reasonable structure of light atoms at hand
CLOSEST = 0.4  #: of the sum of two covalent radii; nearer pairs are no chemistry
HOTTEST = 10.0  #: times the starting temperature (at least 300 K)


@dataclass(frozen=True)
class Dynamics:
    """NVE dynamics of one structure.

    ``energy``: total energy per atom, potential and kinetic, in eV, minus its first value, at every
    step that was taken; the dynamics end where they are no longer ``stable``.
    """

    energy: list[float]
    time_step: float  #: fs
    asked: int  #: steps
    stable: bool
    reason: str  #: why they ended early

    @property
    def drift(self) -> float | None:
        """Slope of a line through the total energy, eV per atom and ps; None before two steps."""
        if len(self.energy) < 3:
            return None
        times = self.time_step / 1000 * np.arange(len(self.energy))
        return float(np.polyfit(times, self.energy, 1)[0])

    @property
    def fluctuation(self) -> float | None:
        """Root mean square of the total energy about that line, eV per atom."""
        if len(self.energy) < 3:
            return None
        times = np.arange(len(self.energy))
        line = np.polyval(np.polyfit(times, self.energy, 1), times)
        return float(np.sqrt(np.mean(np.square(np.array(self.energy) - line))))

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "steps": len(self.energy) - 1,
            "drift": self.drift,
            "fluctuation": self.fluctuation,
        }


def run_dynamics(
    calculator: Calculator,
    structures: Sequence[Atoms],
    *,
    steps: int = 200,
    time_step: float = 0.5,
    temperature: float = 300.0,
    seed: int = 0,
) -> list[Dynamics]:
    """Velocity-Verlet dynamics of every structure, with velocities of ``temperature`` (K).

    All are moved at once where the calculator answers about several
    (:meth:`fairchem_kd.StudentCalculator.calculate_batch`), else one after the other. Dynamics end
    early where a force exceeds :data:`MAX_FORCE`, two atoms come nearer than :data:`CLOSEST`, the
    temperature exceeds :data:`HOTTEST` times its start, or a value is not finite.

    Args:
        calculator: what gives energies and forces.
        structures: where dynamics start; what is fixed stays fixed.
        steps: of each.
        time_step: fs.
        temperature: of the velocities that are drawn.
        seed: of the first structure's velocities; that of the next is one more, and so on.
    """
    runs = [
        _Run(atoms, temperature, np.random.default_rng(seed + number))
        for number, atoms in enumerate(structures)
    ]
    together = [runs] if hasattr(calculator, "calculate_batch") else [[run] for run in runs]
    step = time_step * units.fs
    for group in together:
        _ask(calculator, group)
        for _ in range(steps):
            going = [run for run in group if not run.reason]
            if not going:
                break
            for run in going:
                run.move(step)
            _ask(calculator, going)
            for run in going:
                run.arrive(step)
    return [Dynamics(run.relative, time_step, steps, not run.reason, run.reason) for run in runs]


class _Run:
    """One structure under way."""

    def __init__(self, atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
        self.atoms = atoms.copy()
        self.masses = atoms.get_masses()[:, None]
        self.hottest = HOTTEST * max(300.0, temperature)
        self.energy: list[float] = []  # eV per atom, potential and kinetic
        self.reason = ""
        spread = np.sqrt(units.kB * temperature * self.masses)
        self.atoms.set_momenta(spread * rng.normal(size=(len(atoms), 3)))  # 0 of fixed atoms

    @property
    def relative(self) -> list[float]:
        """What the total energy is over its start, which is 0 where there is no more."""
        return [value - self.energy[0] for value in self.energy] or [0.0]

    def move(self, step: float) -> None:
        """Half of a kick and the way, after which forces are asked for."""
        atoms = self.atoms
        before = atoms.get_positions()
        momenta = atoms.get_momenta() + 0.5 * step * atoms.get_forces(md=True)
        atoms.set_positions(before + step * momenta / self.masses)  # what is held stays
        moved = atoms.get_positions() - before
        atoms.set_momenta(self.masses * moved / step, apply_constraint=False)

    def arrive(self, step: float) -> None:
        """The other half of the kick; and whether it can go on."""
        if not self.reason:
            atoms = self.atoms
            atoms.set_momenta(atoms.get_momenta() + 0.5 * step * atoms.get_forces(md=True))
            self.reason = _broken(atoms, self.hottest)
        if not self.reason:
            self.note()

    def note(self) -> None:
        self.energy.append(float(self.atoms.get_total_energy()) / len(self.atoms))


def _ask(calculator: Calculator, runs: Sequence[_Run]) -> None:
    """Energy and forces of where the structures are, or why there are none."""
    answers = ask_several(calculator, [run.atoms for run in runs])
    for run, answer in zip(runs, answers, strict=True):
        if isinstance(answer, CalculationFailed):  # the labels' method has limits of its own
            run.reason = str(answer)
            continue
        energy, forces = answer["energy"], answer["forces"]
        run.atoms.calc = SinglePointCalculator(run.atoms, energy=energy, forces=forces)
        if not run.energy:
            run.note()


def _broken(system: Atoms, hottest: float) -> str:
    """Why dynamics cannot go on; nothing where they can."""
    forces = system.get_forces()
    if not (np.isfinite(forces).all() and np.isfinite(system.get_potential_energy())):
        return "a value is not finite"
    largest = float(np.linalg.norm(forces, axis=1).max())
    if largest > MAX_FORCE:
        return f"a force of {largest:.0f} eV/Å"
    if system.get_temperature() > hottest:
        return f"a temperature of {system.get_temperature():.0f} K"
    distances = system.get_all_distances(mic=True)
    radii = covalent_radii[system.numbers]
    near = distances / (radii[:, None] + radii) + np.eye(len(system)) * 9
    if near.min() < CLOSEST:
        i, j = np.unravel_index(near.argmin(), near.shape)
        return f"{system.symbols[i]} and {system.symbols[j]} {distances[i, j]:.2f} Å apart"
    return ""
