"""The table of a sweep: each point's metrics, mean and confidence interval over its seeds.

A run speaks through its ``records.jsonl``. What is reported is the validation at which the primary
metric was best, which is the one that ``best_checkpoint.pt`` comes from, or the last one.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.files import write_whole
from fairchem_kd.sweep.columns import columns
from fairchem_kd.sweep.manifest import Manifest, Run, check_config
from fairchem_kd.sweep.state import DONE, Status
from fairchem_kd.training.records import RECORDS, read_records

AT = ("best", "last")
CONFIDENCE = 0.95


@dataclass
class Estimate:
    """A metric over seeds; ``half`` is half the width of its confidence interval."""

    values: list[float]
    mean: float
    half: float | None  # None: one seed has no spread


@dataclass
class Row:
    """One point of a sweep."""

    point: str
    values: dict[str, Any]
    runs: list[Run]
    metrics: dict[str, Estimate] = field(default_factory=dict)
    done: int = 0  # of how many runs there are metrics


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean and confidence interval from Student's t distribution, as for a few normal values."""
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate([*values], mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(
        [*values], mean, float(t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance / n)
    )


def primary_metric(manifest: Manifest, run: Run) -> str:
    """The metric by which the run's best checkpoint was picked.

    Where its config names none, the trainer has chosen one, which stands in the run's records.
    """
    resolved = [record["config"] for record in read_records(manifest.run_folder(run), "config")]
    for config in (*reversed(resolved), check_config(manifest, run)):
        metrics = config.get("evaluation_metrics") or {}
        if metrics.get("primary_metric"):
            return str(metrics["primary_metric"])
    return "energy_mae"


def run_metrics(manifest: Manifest, run: Run, at: str = "best") -> dict[str, float]:
    """A run's validation metrics; empty where it has none yet.

    Args:
        at: ``best`` by its primary metric, or ``last``.
    """
    folder = manifest.run_folder(run)
    if not (folder / RECORDS).exists():
        return {}
    # An interrupted run may have validated a step twice: the later one counts.
    by_step = {record["step"]: record["metrics"] for record in read_records(folder, "val")}
    if not by_step:
        return {}
    found = by_step[max(by_step)]
    if at == "best":
        name = primary_metric(manifest, run)
        rated = [m for m in by_step.values() if m.get(name) is not None]
        sign = 1 if "mae" in name else -1  # as fairchem has it
        found = min(rated, key=lambda metrics: sign * metrics[name]) if rated else {}
    return {name: float(value) for name, value in found.items() if value is not None}


def collect(
    manifest: Manifest, statuses: Mapping[str, Status], at: str = "best", *, partial: bool = False
) -> list[Row]:
    """A row for each point of the sweep, in its order.

    Args:
        statuses: of the runs; those that are not done count only with ``partial``.
    """
    rows: dict[str, Row] = {}
    for run in manifest.listed:
        row = rows.setdefault(run.point, Row(run.point, run.values, []))
        row.runs.append(run)
    for row in rows.values():
        found = [
            metrics
            for run in row.runs
            if (partial or statuses[run.name].state == DONE)
            and (metrics := run_metrics(manifest, run, at))
        ]
        row.done = len(found)
        names = {name: None for metrics in found for name in metrics}
        for name in names:
            row.metrics[name] = estimate([m[name] for m in found if name in m])
    return list(rows.values())


def choose_metrics(rows: Sequence[Row], wanted: Sequence[str] | None) -> list[str]:
    """The metrics to show: those asked for, else every one that the validations have.

    Raises:
        UserError: no run has metrics, or none has one that was asked for.
    """
    known = list({name: None for row in rows for name in row.metrics})
    if not known:
        raise UserError(
            "no run of this sweep has metrics yet: see `fairchem-kd sweep status` (--partial takes "
            "runs that are not done; only fairchem_kd.DistillationTrainer writes records)."
        )
    for name in wanted or ():
        if name not in known:
            raise UserError(f"--metrics: no run has '{name}'{did_you_mean(name, known)}.")
    return list(wanted or known)


def as_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """One line per point: ``<metric>_mean``, ``_ci95`` (half the width) and each seed's value."""
    heads, cells = columns([row.runs[0] for row in rows])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = [f"{m}_{what}" for m in metrics for what in ("mean", "ci95", "values")]
    writer.writerow([*heads, "seeds", "done", *numbers, "runs"])
    for row, cell in zip(rows, cells, strict=True):
        told: list[Any] = []
        for name in metrics:
            found = row.metrics.get(name)
            seeds = " ".join(map(repr, found.values)) if found else ""
            told += [found.mean, found.half, seeds] if found else ["", "", ""]
        names = " ".join(run.name for run in row.runs)
        writer.writerow([*cell, len(row.runs), row.done, *told, names])
    return out.getvalue()


def as_markdown(rows: Sequence[Row], metrics: Sequence[str], title: str, at: str) -> str:
    """The table for people: mean ± half the interval, and how many seeds it is from."""
    heads, cells = columns([row.runs[0] for row in rows])
    lines = [
        f"# {title}",
        "",
        f"Validation at its {at}; mean over seeds ± half of the {CONFIDENCE:.0%} confidence "
        "interval (Student's t). Energies in eV, forces in eV/Å.",
        "",
        _line([*heads, "seeds", *metrics]),
        _line(["---"] * (len(heads) + 1) + ["---:"] * len(metrics)),
    ]
    for row, cell in zip(rows, cells, strict=True):
        count = str(row.done) if row.done == len(row.runs) else f"{row.done} of {len(row.runs)}"
        told = [_told(row.metrics.get(name)) for name in metrics]
        lines.append(_line([*cell, count, *told]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _told(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.4g}" + ("" if found.half is None else f" ± {found.half:.2g}")


def write_tables(
    folder: Path, rows: Sequence[Row], metrics: Sequence[str], title: str, at: str
) -> list[Path]:
    """Write ``results.csv`` and ``results.md``."""
    texts = {
        "results.csv": as_csv(rows, metrics),
        "results.md": as_markdown(rows, metrics, title, at),
    }
    written = []
    for name, text in texts.items():
        data = text.encode()
        written.append(write_whole(folder / name, functools.partial(_write, data)))
    return written


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)
