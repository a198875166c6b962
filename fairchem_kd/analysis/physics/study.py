"""Models side by side as potentials: every measurement on the same structures, and the report.

    calculators, structures -> study_physics -> Physics -> tables, as_dict, figures

``fairchem-kd physics`` is these functions on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ase.calculators.calculator import CalculationFailed
from tqdm import tqdm

from fairchem_kd.analysis.physics.dynamics import run_dynamics
from fairchem_kd.analysis.physics.measure import (
    Consistency,
    Scan,
    against,
    check_forces,
    find_bond,
    relax,
    scan_bond,
)
from fairchem_kd.analysis.physics.summary import Findings, Measured, summarise
from fairchem_kd.analysis.subjects.reference_method import method_calculator

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

FORMAT = 1
#: What every calculator is put through.
PARTS = ("dynamics", "relaxations", "forces", "scans")
#: ps; a student's median drift over 0.1, 0.3 and 1 ps was measured as 135, 40 and 19 meV/atom/ps
DRIFT_NEEDS = 1.0


@dataclass(frozen=True)
class Settings:
    """How long and how finely."""

    md_steps: int = 200
    time_step: float = 0.5  #: fs
    temperature: float = 300.0  #: K
    fmax: float = 0.05  #: eV/Å
    relax_steps: int = 100
    directions: int = 3
    points: int = 25

    @property
    def picoseconds(self) -> float:
        """How long the dynamics are."""
        return self.md_steps * self.time_step / 1000

    @property
    def caution(self) -> str:
        """What to know of a drift over so short a time; empty where it is long enough."""
        if self.picoseconds >= DRIFT_NEEDS:
            return ""
        return (
            f" Over {self.picoseconds:g} ps a slope is mostly that of the energy's coming and "
            f"going: for a drift that counts, {DRIFT_NEEDS:g} ps or more (--md-steps)."
        )


@dataclass
class Physics:
    """What was found; the labels' method, where there is one, among the labels, last.

    ``models``: by label, one for every seed.
    """

    method: str | None
    data: str
    structures: int
    settings: Settings
    models: dict[str, list[Findings]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return list(self.models)

    def summary(self, label: str) -> dict[str, Measured | None]:
        """The figures of one model over all structures and seeds, in eV, Å, ps."""
        truth = None if self.method is None else self.models[self.method][0]
        return summarise(self.models[label], truth)


def study_physics(
    calculators: Mapping[str, Sequence[Calculator]],
    structures: Sequence[Atoms],
    *,
    method: str | None,
    data: str,
    settings: Settings | None = None,
    progress: bool = False,
    parts: Collection[str] = PARTS,
) -> Physics:
    """Put every calculator, and the labels' method, through the same.

    Args:
        calculators: by label, of every seed; dynamics of those that answer about several
            structures, as :class:`fairchem_kd.StudentCalculator` does, are of all of them at once.
        structures: where everything starts.
        method: of the labels (:mod:`fairchem_kd.analysis.subjects.reference_method`), or None.
        data: where the structures come from, for the report.
        settings: how long and how finely.
        progress: show a bar on a terminal.
        parts: of what; figures of the others are None.

    Raises:
        UserError: the method's package is not installed.
    """
    settings = settings or Settings()
    found = Physics(method, data, len(structures), settings)
    everyone = {label: list(seeds) for label, seeds in calculators.items()}
    held_to: _Method | None = None
    if method is not None:
        everyone[method] = [method_calculator(method)]
        held_to = _Method(everyone[method][0])
    total = len(parts) * len(structures) * sum(len(seeds) for seeds in everyone.values())
    with tqdm(total=total, disable=None if progress else True) as bar:
        for label in reversed(everyone):  # the method first, which the others are held to
            bar.set_description(label)
            found.models[label] = [
                _findings(one, structures, settings, held_to, bar.update, parts)
                for one in everyone[label]
            ]
    found.models = dict(reversed(found.models.items()))
    return found


@dataclass
class _Method:
    """The labels' method, and where its own relaxations end."""

    calculator: Calculator
    ends: list[Atoms] = field(default_factory=list)


def _findings(
    calculator: Calculator,
    structures: Sequence[Atoms],
    settings: Settings,
    method: _Method | None,
    done: Callable[..., Any],
    parts: Collection[str],
) -> Findings:
    """What one calculator does; that of the method fills in its ends."""
    found = Findings()
    if "dynamics" in parts:
        found.dynamics = run_dynamics(
            calculator,
            structures,
            steps=settings.md_steps,
            time_step=settings.time_step,
            temperature=settings.temperature,
        )
        done(len(structures))
    for index, atoms in enumerate(structures):
        if "relaxations" in parts:
            relaxation, end = relax(
                calculator, atoms, fmax=settings.fmax, steps=settings.relax_steps
            )
            if method is not None:
                if calculator is method.calculator:
                    method.ends.append(end)
                relaxation = against(relaxation, end, method.calculator, method.ends[index])
            found.relaxations.append(relaxation)
            done()
        if "forces" in parts:
            found.consistency.append(_forces(calculator, atoms, settings, index))
            done()
        if "scans" in parts:
            found.scans.append(_scan(calculator, atoms, settings))
            done()
    return found


def _forces(calculator: Calculator, atoms: Atoms, settings: Settings, seed: int) -> Consistency:
    try:
        return check_forces(calculator, atoms, directions=settings.directions, seed=seed)
    except CalculationFailed:
        return Consistency([], [])


def _scan(calculator: Calculator, atoms: Atoms, settings: Settings) -> Scan | None:
    bond = find_bond(atoms)
    if bond is None:
        return None
    try:
        return scan_bond(calculator, atoms, bond, points=settings.points)
    except CalculationFailed:
        return None


# -- tables and files ------------------------------------------------------------------------------
