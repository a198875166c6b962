"""Models side by side as potentials: every measurement on the same structures, and the report.

    calculators, structures -> study_physics -> Physics -> tables, as_dict, figures, write

``fairchem-kd physics`` is these functions on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase.calculators.calculator import CalculationFailed
from tqdm import tqdm

from fairchem_kd.analysis.output import write_json, write_plots, write_tables
from fairchem_kd.analysis.physics import (
    Consistency,
    Scan,
    against,
    check_forces,
    find_bond,
    relax,
    run_dynamics,
    scan_bond,
)
from fairchem_kd.analysis.physics_summary import Findings, Measured, summarise
from fairchem_kd.analysis.reference_method import method_calculator
from fairchem_kd.analysis.tables import Table, number, significant
from fairchem_kd.records import plain

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

FORMAT = 1


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
) -> Physics:
    """Put every calculator, and the labels' method, through the same.

    Args:
        calculators: by label, of every seed, as
            :func:`fairchem_kd.analysis.calculators.make_calculator` gives them.
        structures: where everything starts.
        method: of the labels (:mod:`fairchem_kd.analysis.reference_method`), or None.
        data: where the structures come from, for the report.
        settings: how long and how finely.
        progress: show a bar on a terminal.

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
    total = 4 * len(structures) * sum(len(seeds) for seeds in everyone.values())
    with tqdm(total=total, disable=None if progress else True) as bar:
        for label in reversed(everyone):  # the method first, which the others are held to
            bar.set_description(label)
            found.models[label] = [
                _findings(one, structures, settings, held_to, bar.update) for one in everyone[label]
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
    done: Callable[[], Any],
) -> Findings:
    """What one calculator does; that of the method fills in its ends."""
    found = Findings()
    for index, atoms in enumerate(structures):
        found.dynamics.append(
            run_dynamics(
                calculator,
                atoms,
                steps=settings.md_steps,
                time_step=settings.time_step,
                temperature=settings.temperature,
                seed=index,
            )
        )
        done()
        relaxation, end = relax(calculator, atoms, fmax=settings.fmax, steps=settings.relax_steps)
        if method is not None:
            if calculator is method.calculator:
                method.ends.append(end)
            relaxation = against(relaxation, end, method.calculator, method.ends[index])
        found.relaxations.append(relaxation)
        done()
        found.consistency.append(_forces(calculator, atoms, settings, index))
        done()
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


def tables(found: Physics) -> list[Table]:
    """Dynamics; relaxations; forces and bond scans."""
    settings = found.settings
    of = f"{found.structures} structures of {found.data}"
    dynamics = Table(
        "NVE dynamics",
        ["model", "stable (%)", "drift (meV/atom/ps)", "fluctuation (meV/atom)", "broken by"],
    )
    relaxations = Table(
        "Relaxations",
        ["model", "converged (%)", "steps", "energy above (meV)", "displacement (Å)"],
    )
    forces = Table(
        "Forces and bond scans",
        ["model", "|F + dE/dx| (meV/Å)", "relative (%)", "scan |F + dE/dr| (meV/Å)",
         "turns of E", "scan error (meV)"],
    )  # fmt: skip
    for label in found.labels:
        row = found.summary(label)
        reasons = [d.reason for one in found.models[label] for d in one.dynamics if d.reason]
        dynamics.add(
            label,
            figure(row["md_stable"], 100, 0),
            figure(row["md_drift"], 1000),
            figure(row["md_fluctuation"], 1000),
            "-" if not reasons else f"{reasons[0]}{' and others' * (len(reasons) > 1)}",
        )
        relaxations.add(
            label,
            figure(row["relax_converged"], 100, 0),
            figure(row["relax_steps"], 1, 0),
            figure(row["relax_energy_above"], 1000),
            figure(row["relax_displacement"]),
        )
        forces.add(
            label,
            figure(row["force_mismatch"], 1000),
            figure(row["force_mismatch_relative"], 100, 1),
            figure(row["scan_mismatch"], 1000),
            figure(row["scan_turns"], 1, 1),
            figure(row["scan_error"], 1000),
        )
    dynamics.notes.append(
        f"{of}; {settings.md_steps} steps of {settings.time_step:g} fs, velocities of "
        f"{settings.temperature:g} K, the same for all. Median over structures of the total "
        "energy's slope (without sign) and of its spread about that line."
    )
    brackets = "In brackets 95 % intervals over structures"
    if any(len(seeds) > 1 for seeds in found.models.values()):
        brackets = f"±: standard deviation over seeds, of which the mean is given. {brackets}"
    dynamics.notes.append(f"{brackets}.")
    relaxations.notes.append(
        f"BFGS from {of}, at most {settings.relax_steps} steps, until no force exceeds "
        f"{settings.fmax:g} eV/Å."
    )
    if found.method is not None:
        relaxations.notes.append(
            f"Medians over structures. Energy above: by {found.method}, of where the model's "
            f"relaxation ends over where {found.method}'s own ends (negative: it found a lower "
            "minimum); displacement: rms distance of the free atoms between the two."
        )
    forces.notes.append(
        "Forces against central differences of the energy, along random directions of all free "
        "atoms, and along a bond of each structure. A potential has no difference; a model with "
        "direct forces is none. Turns: extrema of the energy along the bond, 1 in a "
        "single well."
    )
    if found.method is not None:
        forces.notes.append(f"Scan error: of the energy curve against {found.method}'s.")
    return [dynamics, relaxations, forces]


def figure(measured: Measured | None, factor: float = 1.0, digits: int | None = None) -> str:
    """``12.3 ± 0.4 [11.0, 13.1]``; a dash where there is none.

    Args:
        measured: the figure.
        factor: to the unit that is shown.
        digits: after the point; by default three significant ones.
    """
    if measured is None:
        return "-"

    def text(value: float) -> str:
        scaled = factor * value
        return significant(scaled) if digits is None else number(scaled, digits)

    shown = text(measured.value)
    if measured.over_seeds is not None:
        shown += f" ± {text(measured.over_seeds)}"
    if measured.over_structures is not None:
        shown += f" [{', '.join(text(value) for value in measured.over_structures)}]"
    return shown


def as_dict(found: Physics) -> dict[str, Any]:
    """Everything, of plain values: eV, Å, fs; drifts in eV per atom and ps."""
    return plain(
        {
            "format": FORMAT,
            "data": found.data,
            "structures": found.structures,
            "method": found.method,
            "settings": vars(found.settings),
            "models": {
                label: {
                    "summary": {
                        name: one and one.as_dict() for name, one in found.summary(label).items()
                    },
                    "seeds": [one.as_dict() for one in seeds],
                }
                for label, seeds in found.models.items()
            },
        }
    )


def write(found: Physics, folder: Path, *, with_plots: bool = True) -> list[Path]:
    """Write physics.md, physics.json and, if asked for, plots into ``folder``; returns the files.

    Raises:
        UserError: plots are asked for and matplotlib is missing.
    """
    written = [
        write_tables(folder / "physics.md", tables(found)),
        write_json(folder / "physics.json", as_dict(found)),
    ]
    if with_plots:
        from fairchem_kd.analysis.plots_physics import figures

        written += write_plots(folder, figures(found))
    return written
