"""Where distilled students differ from their teacher: what further structures could teach them.

    OMP_NUM_THREADS=1 python benchmarks/where_students_err.py RUN [RUN ...] --teacher FILE

RUNs are students of one recipe, trained with several seeds. They and the teacher are asked about
structures of the training and test splits, and about what `fairchem-kd explore` makes of those of
the training split: displaced copies, relaxed ones, frames of the teacher's dynamics and of each
student's own. A kind of structure on which students are as close to the teacher as on those that
they were trained on has nothing to teach them. Of a student's own dynamics all frames count, and
the share of trajectories that broke a limit is told.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from fairchem_kd.analysis.subjects.runs import find_checkpoint
from fairchem_kd.explore.exploration import Plan, explore
from fairchem_kd.explore.guards import Limits
from fairchem_kd.explore.potentials import ModelPotential
from fairchem_kd.explore.settings import Settings, Window
from fairchem_kd.explore.starts import Source, Start, read_starts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALL = Window(0.0, 1e6)
BATCH = 32


class Teacher:
    """What a teacher says of sets of structures, asked once about each."""

    def __init__(self, path: Path) -> None:
        self.potential = ModelPotential(path, cpu=True)
        self._said: dict[str, list[Any]] = {}

    def of(self, name: str, starts: Sequence[Start]) -> list[Any]:
        if name not in self._said:
            self._said[name] = asked(self.potential, starts)
        return self._said[name]


def asked(potential: ModelPotential, starts: Sequence[Start]) -> list[Any]:
    found = []
    for at in range(0, len(starts), BATCH):
        found += potential([start.atoms() for start in starts[at : at + BATCH]])
    return found


def apart(starts: Sequence[Start], one: Sequence[Any], other: Sequence[Any]) -> dict[str, float]:
    """Mean absolute differences, meV and meV/Å, and of largest ones on an atom nine in ten."""
    energies, forces, largest = [], [], []
    for start, mine, theirs in zip(starts, one, other, strict=True):
        if mine is None or theirs is None:
            continue
        energies.append(abs(mine.energy - theirs.energy))
        difference = (mine.forces - theirs.forces)[start.free]
        forces.append(np.abs(difference).ravel())
        largest.append(np.linalg.norm(difference, axis=1).max(initial=0.0))
    return {
        "structures": len(energies),
        "E": 1e3 * mean(energies),
        "F": 1e3 * float(np.concatenate(forces).mean()),
        "F max": 1e3 * float(np.quantile(largest, 0.9)),
    }


def kinds(args: argparse.Namespace) -> dict[str, Settings]:
    """The explorations; those of the mode ``student`` are made anew for each of them."""
    common: dict[str, Any] = {
        "limits": Limits(max_gap=1e6),
        "batch": BATCH,
        "most": args.structures,
    }
    found = {
        f"rattled, {std:g} Å": Settings(mode="rattle", std=(std,), copies=2, **common)
        for std in (0.03, 0.06, 0.12)
    }
    run = {"steps": args.steps, "every": max(1, args.steps // 10)}
    heat = {f"{kelvin:g} K": (kelvin, kelvin) for kelvin in args.temperatures}
    found["rattled and relaxed"] = Settings(mode="relax", temperature=(500.0, 500.0), **common)
    for name, kelvin in heat.items():
        found[f"teacher's dynamics, {name}"] = Settings(
            mode="md", temperature=kelvin, **run, **common
        )
    for name, kelvin in heat.items():
        found[f"student's dynamics, {name}"] = Settings(
            mode="student", temperature=kelvin, window=ALL, **run, **common
        )
    return found


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    teacher = Teacher(args.teacher)
    runs = [find_checkpoint(run) for run in args.runs]
    students = [ModelPotential(run, cpu=True) for run in runs]
    given = Source(args.data / "train", "train")
    sets: dict[str, list[Start]] = {}
    for name in ("train", "test", "test_ood"):
        if (args.data / name).is_dir():
            source = Source(args.data / name, name)
            sets[f"the split {name}"] = list(read_starts(source, args.structures))
    rows: list[dict[str, Any]] = []

    def note(kind: str, number: int, starts: Sequence[Start], key: str, **more: Any) -> None:
        said = asked(students[number], starts)
        row = {"kind": kind, "seed": number, **apart(starts, said, teacher.of(key, starts)), **more}
        rows.append(row)
        print(row, flush=True)

    for kind, starts in sets.items():
        for number in range(len(students)):
            note(kind, number, starts, kind)
    for place, (kind, settings) in enumerate(kinds(args).items()):
        own = settings.mode == "student"
        limit = args.structures if settings.mode in ("rattle", "relax") else args.trajectories
        starts: list[Start] = []
        more: dict[str, Any] = {}
        for number, student in enumerate(students):
            if own or not starts:
                dest = work / f"{place}-{number}"
                asker = None if settings.mode == "rattle" else teacher.potential
                plan = Plan([given], settings, asker, student if own else None, limit)
                told = explore(plan, dest)["exploration"]
                starts = list(read_starts(Source(dest / "train", "train")))
                if own:
                    more = {"broke": 100 * told["crashes"] / limit}
            note(kind, number, starts, f"{kind} {number}" if own else kind, **more)
    return rows


def table(rows: Sequence[dict[str, Any]], asked_with: str) -> str:
    """Means and standard deviations over the students, in Markdown."""
    lines = [
        f"`{asked_with}`; mean absolute differences of students from their teacher, mean and "
        "standard deviation over students: energies in meV, forces in meV/Å; F max: that of the "
        "worst atom which nine in ten structures stay below; to train: F over that of the split "
        "train.",
        "",
        "| structures | E | F | F max | to train | broke a limit, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = [row["F"] for row in rows if row["kind"] == rows[0]["kind"]]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["seed"])
        cells = [cell([row[key] for row in own]) for key in ("E", "F", "F max")]
        ratio = mean(row["F"] / base for row, base in zip(own, first, strict=True))
        broke = cell([row["broke"] for row in own]) if "broke" in own[0] else ""
        lines.append(f"| {kind} | {' | '.join(cells)} | {ratio:.2f} | {broke} |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float]) -> str:
    return f"{mean(values):.0f}" + (f" ± {stdev(values):.0f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "collisions")
    parser.add_argument("--structures", type=int, default=240, help="of each kind, at most")
    parser.add_argument("--trajectories", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[500.0, 1000.0])
    parser.add_argument("--name", default="collisions", help="of the results' files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(args, Path(work))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"where_students_err_{args.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kind", "seed", "structures", "E", "F", "F max", "broke"])
        writer.writeheader()
        writer.writerows(
            {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    words = f"python benchmarks/where_students_err.py RUN ... --structures {args.structures} "
    words += f"--trajectories {args.trajectories} --steps {args.steps} --temperatures "
    words += " ".join(f"{kelvin:g}" for kelvin in args.temperatures)
    text = table(rows, words)
    (args.out / f"where_students_err_{args.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
