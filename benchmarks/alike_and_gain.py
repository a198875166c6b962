"""Does it show before the training which loss on features will pay?

    python benchmarks/alike_and_gain.py runs/sweeps/{losses,losses_alone,pairs_of_layers}

of finished sweeps (``fairchem-kd sweep run yaml_configs/sweeps/losses.yml``, and so on). For every
run with one loss on features: how alike the two layers were before the training, as CKA and as
what a linear probe reads of the teacher's layer out of the untrained student's (the share of its
variance on structures that the probe was not fitted on); and how much lower the validation errors
are than
those of the run of the same sweep that has every other loss but this one. Then Spearman's rank
correlation of the two, for each sweep.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from fairchem_kd.analysis.cka.layers import FORMS, distilled_pairs
from fairchem_kd.analysis.cka.similarity import Form, Similarity
from fairchem_kd.analysis.subjects.runs import read_model
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.models.build import build
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.sweep.collect import run_metrics
from fairchem_kd.sweep.manifest import read_manifest

RESULTS = Path(__file__).resolve().parent / "results"
STRUCTURES = 64  # of the training set
ERRORS = ("energy_mae", "forces_mae")


@dataclass
class Row:
    """One loss on features: what was there before, and what it gained."""

    sweep: str
    point: str
    form: Form
    student: str
    teacher: str
    cka: float
    probe: float  #: R² on held-out structures
    energy_gain: float  #: share of the baseline's validation error
    forces_gain: float


def rows_of(folder: Path) -> list[Row]:
    """Of a finished sweep, a row for every run with one loss on features."""
    manifest = read_manifest(folder)
    files = {run.point: read_model(manifest.run_folder(run)) for run in manifest.listed}
    errors = {run.point: run_metrics(manifest, run) for run in manifest.listed}
    outputs = {point: "vanilla" in file.losses for point, file in files.items()}
    baselines = {  # with the teacher's outputs, and without them
        outputs[point]: errors[point] for point, file in files.items() if not features_of(file)
    }
    rows = []
    for point, file in files.items():
        marks = [mark for mark in distilled_pairs(file) if mark.form in FORMS]
        if len(marks) != 1 or len(features_of(file)) != 1:
            continue
        mark = marks[0]
        similarity, probe = before_training(file.config, mark.form, mark.student, mark.teacher)
        before = baselines[outputs[point]]
        gains = [1 - errors[point][name] / before[name] for name in ERRORS]
        rows.append(
            Row(
                folder.name, point, mark.form, mark.student, mark.teacher, similarity, probe, *gains
            )
        )
        told = f"CKA {similarity:.2f}, probe {probe:.2f}, E {-gains[0]:+.1%}, F {-gains[1]:+.1%}"
        print(f"{point}: {told}")
    return rows


def features_of(file: Any) -> list[str]:
    """The losses of a run that are not on outputs."""
    return [name for name in file.losses if name != "vanilla"]


def before_training(
    config: Mapping[str, Any], form: Form, student: str, teacher: str
) -> tuple[float, float]:
    """CKA and linear probe of two layers, with the weights that the student starts from."""
    with isolated_random_state():
        torch.manual_seed(config["cmd"]["seed"])
        untrained = Teacher(
            build(config["model"], Path("student")), Units({}, {}), {}, name="student"
        )
    models = {
        "student": (untrained, Request(student, form)),
        "teacher": (
            Teacher.from_checkpoint(config["task"]["distillation"]["teacher"]["checkpoint"]),
            Request(teacher, form),
        ),
    }
    taps = {n: FeatureExtractor(model.model, [request]) for n, (model, request) in models.items()}
    similarity = Similarity(form, [("student", "teacher")])
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    structures: list[NDArray[np.int64]] = []
    with open_structures(config["dataset"], limit=STRUCTURES) as opened:
        for number, batch in enumerate(opened.batches(16)):
            found = {}
            for name, (model, request) in models.items():
                captured = model.forward(batch, taps[name]).features
                assert captured is not None
                found[name] = captured[request].values
                kept[name].append(found[name].double())
            similarity.update(found, number * 16 / STRUCTURES)
            structures.append(batch.batch.numpy() + 16 * number)
    x, y = (torch.cat(kept[name]).numpy() for name in ("student", "teacher"))
    return similarity.cka("student", "teacher").value, probed(x, y, np.concatenate(structures))


def probed(x: NDArray[np.float64], y: NDArray[np.float64], structure: NDArray[np.int64]) -> float:
    """The share of the variance of ``y`` that a ridge regression on ``x`` finds, held out.

    Args:
        x: ``(N, D)``, or vectors ``(N, 3, D)``, whose components are rows without an intercept.
        y: ``(N, E)`` or ``(N, 3, E)``.
        structure: ``(N,)``; every fourth structure is held out.
    """
    held = structure % 4 == 3
    if x.ndim == 2:
        mean_x, mean_y = x[~held].mean(0), y[~held].mean(0)
    else:
        mean_x, mean_y = np.zeros(x.shape[-1]), np.zeros(y.shape[-1])
    fit_x, fit_y, test_x, test_y = (
        part.reshape(-1, part.shape[-1])
        for part in (x[~held] - mean_x, y[~held] - mean_y, x[held] - mean_x, y[held] - mean_y)
    )
    gram = fit_x.T @ fit_x
    ridge = 1e-3 * np.trace(gram) / len(gram)
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), fit_x.T @ fit_y)
    return float(1 - np.square(test_y - test_x @ weights).sum() / np.square(test_y).sum())


def table(rows: list[Row]) -> str:
    """The rows, and under them the rank correlations of each sweep."""
    lines = [
        "| sweep | point | student | teacher | CKA before | probe before | E | F |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.sweep} | {r.point} | `{r.student}` | `{r.teacher}` | {r.cka:.2f} | {r.probe:.2f} "
        f"| {-r.energy_gain:+.1%} | {-r.forces_gain:+.1%} |"
        for r in rows
    ]
    lines += [
        "",
        "E, F: the change of the validation's errors against the run without the loss.",
        "",
        "Spearman's rank correlation of what was before with the gain (p of no correlation):",
        "",
        "| runs | n | CKA, E | CKA, F | probe, E | probe, F |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = {
        f"{sweep}, {'on top of outputs' if top else 'alone'}": [
            r for r in rows if r.sweep == sweep and with_outputs(r) == top
        ]
        for sweep in dict.fromkeys(r.sweep for r in rows)
        for top in (True, False)
    }
    for name, some in groups.items():
        if len(some) < 4:
            continue
        cells = []
        for before in ("cka", "probe"):
            for gain in ("energy_gain", "forces_gain"):
                found = spearmanr(
                    [getattr(r, before) for r in some], [getattr(r, gain) for r in some]
                )
                cells.append(f"{found.statistic:+.2f} ({found.pvalue:.2f})")
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_outputs(row: Row) -> bool:
    """By the names that the shipped sweeps give to their points."""
    return row.sweep == "pairs_of_layers" or row.point.startswith("outputs_and_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of finished sweeps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for folder in args.sweeps for row in rows_of(folder)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "alike_and_gain.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([one.name for one in fields(Row)])
        writer.writerows([getattr(row, one.name) for one in fields(Row)] for row in rows)
    text = table(rows)
    (args.out / "alike_and_gain.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
