"""How models do as potentials: tables, plain values and a figure."""

from __future__ import annotations

from typing import Any

from fairchem_kd.analysis.physics.study import FORMAT, Physics
from fairchem_kd.analysis.physics.summary import Measured
from fairchem_kd.files import plain
from fairchem_kd.report.tables import Table, number, significant


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
        f"{settings.caution}"
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
