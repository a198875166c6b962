"""What a student is worth on structures of several kinds, and as a potential: of structures.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_kd.analysis.compare.evaluation import evaluate
from fairchem_kd.analysis.physics.dynamics import CLOSEST, MAX_FORCE
from fairchem_kd.analysis.subjects.reference_method import EMT, method_calculator
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.splits import open_split
from fairchem_kd.explore.dynamics import Walker, drive
from fairchem_kd.explore.guards import Limits
from fairchem_kd.explore.potentials import Answer, ModelPotential
from fairchem_kd.explore.rattling import placed
from fairchem_kd.explore.settings import Settings
from fairchem_kd.explore.starts import Source, Start, read_starts
from fairchem_kd.reading import read_json

KELVIN = 500.0


class Labels:
    """What the method says of a structure, with the energies' zero of the data set."""

    def __init__(self, data: Path, method: str) -> None:
        card = read_json(data / "card.json")
        self.references = {int(z): e for z, e in card["reference_energies"].items()}
        self.calculator = method_calculator(method)
        self.pbc = method == EMT

    def __call__(self, numbers: Any, pos: Any, cell: Any) -> Answer | None:
        import ase
        from ase.calculators.calculator import CalculationFailed

        atoms = ase.Atoms(numbers, pos, cell=np.asarray(cell), pbc=self.pbc)
        atoms.calc = self.calculator
        try:
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        except CalculationFailed:
            return None
        return Answer(float(energy - sum(self.references[int(z)] for z in numbers)), forces)


def judged(
    student: Path, data: Path, labels: Labels, long: Path, dynamics: tuple[int, int]
) -> dict[str, float]:
    """Errors, meV and meV/Å, and its own ``dynamics`` of so many structures and steps."""
    model = load_model(read_model(student))
    found: dict[str, float] = {}
    splits = {name: data / name for name in ("test", "test_ood")} | {"long": long}
    for name, path in splits.items():
        with open_split({"format": "lmdb", "src": str(path)}, name) as split:
            metrics = evaluate(model, split, batch_size=64).metrics
        found[f"{name} E"] = 1e3 * metrics["energy_mae"]
        found[f"{name} F"] = 1e3 * metrics["forces_mae"]
    return found | nve(student, data, labels, *dynamics)


def nve(student: Path, data: Path, labels: Labels, number: int, steps: int) -> dict[str, float]:
    """The student's NVE dynamics from the test split, all structures side by side."""
    starts = list(read_starts(Source(data / "test", "test"), number))
    settings = Settings(
        mode="student", seed=2, temperature=(KELVIN, KELVIN), steps=steps, every=steps // 20,
        friction=0.0, limits=Limits(CLOSEST, 1e6, MAX_FORCE), batch=number,
    )  # fmt: skip
    walkers = [Walker(i, start, settings) for i, start in enumerate(starts)]
    total: dict[int, list[float]] = {walker.number: [] for walker in walkers}
    visited: list[tuple[Start, Any, Any]] = []

    def at_frames(step: int, going: Sequence[tuple[Walker, Answer]]) -> None:
        for walker, answer in going:
            mass = walker.atoms.get_masses()[:, None]
            kinetic = 0.5 * float((mass * walker.velocity**2).sum())
            total[walker.number].append((answer.energy + kinetic) / len(walker.atoms))
            if step % (steps // 5) == 0:
                visited.append((walker.start, walker.atoms.positions.copy(), answer.forces))

    drive(walkers, ModelPotential(student, cpu=True), settings, at_frames, lambda *_: None)
    lasted = [walker for walker in walkers if not walker.done]
    time_ps = settings.time_step * settings.every / 1000
    slopes = [
        abs(np.polyfit(time_ps * np.arange(len(total[w.number])), total[w.number], 1)[0])
        for w in lasted
    ]
    apart = list(_apart(labels, visited))
    return {
        "lasted": 100 * len(lasted) / len(walkers),
        "drift": 1e3 * float(np.median(slopes)) if slopes else float("nan"),
        "own F": 1e3 * float(np.concatenate(apart).mean()) if apart else float("nan"),
    }


def _apart(labels: Labels, visited: Sequence[tuple[Start, Any, Any]]) -> Iterator[Any]:
    """Absolute differences of the student's forces from the method's, on free atoms, eV/Å."""
    for start, pos, forces in visited:
        at = placed(start, pos)
        said = labels(start.numbers, at.positions, start.cell)
        if said is not None:
            yield np.abs(forces - said.forces)[start.free].ravel()
