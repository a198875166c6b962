"""Models side by side as potentials: every measurement on the same structures, and the report.

    calculators, structures -> study_physics -> Physics -> tables, as_dict, figures, write

``fairchem-kd physics`` is these functions on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import CalculationFailed
from tqdm import tqdm

from fairchem_kd.analysis.output import write_json, write_plots, write_tables
from fairchem_kd.analysis.physics import (
    Consistency,
    Dynamics,
    Relaxation,
    Scan,
    against,
    check_forces,
    find_bond,
    relax,
    run_dynamics,
    scan_bond,
)
from fairchem_kd.analysis.reference_method import method_calculator
from fairchem_kd.analysis.tables import Table, number, significant
from fairchem_kd.records import plain

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """What was found, by label; the labels' method, where there is one, among the labels, last."""

    labels: list[str]
    method: str | None
    data: str
    structures: int
    settings: Settings
    dynamics: dict[str, list[Dynamics]] = field(default_factory=dict)
    relaxations: dict[str, list[Relaxation]] = field(default_factory=dict)
    consistency: dict[str, list[Consistency]] = field(default_factory=dict)
    scans: dict[str, list[Scan | None]] = field(default_factory=dict)


def study_physics(
    calculators: Mapping[str, Calculator],
    structures: Sequence[Atoms],
    *,
    method: str | None,
    data: str,
    settings: Settings | None = None,
    progress: bool = False,
) -> Physics:
    """Put every calculator, and the labels' method, through the same.

    Args:
        calculators: by label, as :func:`fairchem_kd.analysis.calculators.make_calculator` gives
            them.
        structures: where everything starts.
        method: of the labels (:mod:`fairchem_kd.analysis.reference_method`), or None.
        data: where the structures come from, for the report.
        settings: how long and how finely.
        progress: show a bar on a terminal.

    Raises:
        UserError: the method's package is not installed.
    """
    settings = settings or Settings()
    everyone = dict(calculators)
    if method is not None:
        everyone[method] = method_calculator(method)
    found = Physics(list(everyone), method, data, len(structures), settings)
    bar = tqdm(total=4 * len(everyone) * len(structures), disable=None if progress else True)
    ends: dict[str, list[Atoms]] = {}
    for label, calculator in reversed(everyone.items()):  # the method, which others are held to
        for part in (found.dynamics, found.relaxations, found.consistency, found.scans):
            part[label] = []
        ends[label] = []
        for index, atoms in enumerate(structures):
            bar.set_description(label)
            found.dynamics[label].append(
                run_dynamics(
                    calculator,
                    atoms,
                    steps=settings.md_steps,
                    time_step=settings.time_step,
                    temperature=settings.temperature,
                    seed=index,
                )
            )
            bar.update()
            relaxation, end = relax(
                calculator, atoms, fmax=settings.fmax, steps=settings.relax_steps
            )
            if method is not None:
                best = ends[method][index] if label != method else end
                relaxation = against(relaxation, end, everyone[method], best)
            ends[label].append(end)
            found.relaxations[label].append(relaxation)
            bar.update()
            found.consistency[label].append(_forces(calculator, atoms, settings, index))
            bar.update()
            found.scans[label].append(_scan(calculator, atoms, settings))
            bar.update()
    bar.close()
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


# -- summaries -------------------------------------------------------------------------------------


def summary(found: Physics, label: str) -> dict[str, float | None]:
    """The figures of one model over all structures, in eV, Å, ps; None where there are none."""
    dynamics, relaxations = found.dynamics[label], found.relaxations[label]
    forces = np.array([value for one in found.consistency[label] for value in one.forces])
    slopes = np.array([value for one in found.consistency[label] for value in one.differences])
    scans = [scan for scan in found.scans[label] if scan is not None]
    errors = []
    if found.method is not None:
        pairs = zip(found.scans[label], found.scans[found.method], strict=True)
        errors = [ours.error(theirs) for ours, theirs in pairs if ours and theirs]
    return {
        "md_stable": _mean([d.stable for d in dynamics]),
        "md_drift": _median([abs(d.drift) for d in dynamics if d.drift is not None]),
        "md_fluctuation": _median([d.fluctuation for d in dynamics]),
        "relax_converged": _mean([r.converged for r in relaxations]),
        "relax_steps": _mean([r.steps for r in relaxations]),
        "relax_energy_above": _median([r.energy_above for r in relaxations]),
        "relax_displacement": _median([r.displacement for r in relaxations]),
        "force_mismatch": _mean(np.abs(forces - slopes)),
        "force_mismatch_relative": _relative(forces, slopes),
        "scan_error": _mean(errors),
        "scan_mismatch": _mean([scan.mismatch for scan in scans]),
        "scan_turns": _mean([scan.turns for scan in scans]),
    }


def _relative(forces: Any, slopes: Any) -> float | None:
    """Root mean square of the mismatch over that of the slopes of the energy."""
    whole = float(np.sqrt(np.mean(np.square(slopes)))) if len(slopes) else 0.0
    return float(np.sqrt(np.mean(np.square(forces - slopes)))) / whole if whole else None


def _known(values: Any) -> list[float]:
    return [float(value) for value in values if value is not None and np.isfinite(value)]


def _mean(values: Any) -> float | None:
    known = _known(values)
    return float(np.mean(known)) if known else None


def _median(values: Any) -> float | None:
    known = _known(values)
    return float(np.median(known)) if known else None


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
        row = summary(found, label)
        reasons = dict.fromkeys(d.reason for d in found.dynamics[label] if d.reason)
        dynamics.add(
            label,
            _times(row["md_stable"], 100, 0),
            _milli(row["md_drift"]),
            _milli(row["md_fluctuation"]),
            "; ".join(list(reasons)[:2]) or "-",
        )
        relaxations.add(
            label,
            _times(row["relax_converged"], 100, 0),
            number(row["relax_steps"], 0),
            _milli(row["relax_energy_above"]),
            significant(row["relax_displacement"]),
        )
        forces.add(
            label,
            _milli(row["force_mismatch"]),
            _times(row["force_mismatch_relative"], 100, 1),
            _milli(row["scan_mismatch"]),
            number(row["scan_turns"], 1),
            _milli(row["scan_error"]),
        )
    dynamics.notes.append(
        f"{of}; {settings.md_steps} steps of {settings.time_step:g} fs, velocities of "
        f"{settings.temperature:g} K, the same for all. Median over structures of the total "
        "energy's slope (without sign) and of its spread about that line."
    )
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
        "atoms, and along the tightest bond of each structure. A potential has no difference; a "
        "model with direct forces is none. Turns: extrema of the energy along the bond, 1 in a "
        "single well."
    )
    if found.method is not None:
        forces.notes.append(f"Scan error: of the energy curve against {found.method}'s.")
    return [dynamics, relaxations, forces]


def _times(value: float | None, factor: float, digits: int) -> str:
    return number(None if value is None else factor * value, digits)


def _milli(value: float | None) -> str:
    return significant(None if value is None else 1000 * value)


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
                    "summary": summary(found, label),
                    "dynamics": [one.as_dict() for one in found.dynamics[label]],
                    "relaxations": [one.as_dict() for one in found.relaxations[label]],
                    "forces": [one.as_dict() for one in found.consistency[label]],
                    "scans": [one and one.as_dict() for one in found.scans[label]],
                }
                for label in found.labels
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
        drawn = {"physics_dynamics": plot_dynamics(found), "physics_scans": plot_scans(found)}
        written += write_plots(folder, drawn)
    return written


def plot_dynamics(found: Physics) -> Figure:
    """Total energy against time, a panel for each of the first structures."""

    def draw(axes: Axes, label: str, index: int, looks: dict[str, Any]) -> None:
        run = found.dynamics[label][index]
        times = run.time_step * np.arange(len(run.energy))
        looks = {**looks, "markevery": 0.2}
        axes.plot(times, 1000 * np.array(run.energy), label=label, **looks)
        axes.set_xlabel("time (fs)")

    return _panels(found, draw, "change of total energy (meV/atom)")


def plot_scans(found: Physics) -> Figure:
    """Energy along the bonds of the first structures, counted from its lowest value."""

    def draw(axes: Axes, label: str, index: int, looks: dict[str, Any]) -> None:
        scan = found.scans[label][index]
        if scan is not None:
            energies = np.array(scan.energies) - min(scan.energies)
            axes.plot(scan.lengths, energies, label=label, **looks)
            axes.set_xlabel(f"{scan.bond} distance (Å)")

    return _panels(found, draw, "energy over its lowest (eV)")


def _panels(
    found: Physics, draw: Callable[[Axes, str, int, dict[str, Any]], None], y_label: str
) -> Figure:
    """A panel for each of the first structures, in which ``draw`` draws every model."""
    from fairchem_kd.analysis.plots import legend, new_figure, style

    count = min(3, found.structures)
    figure = new_figure(1.2 + 3.0 * count, 3.6)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for index, axes in enumerate(panels):
        for place, label in enumerate(found.labels):
            draw(axes, label, index, {**style(place), "markersize": 4, "linewidth": 1.2})
        axes.set_title(f"structure {index + 1}", fontsize=9)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_ylabel(y_label)
    legend(figure, panels[0])
    return figure
