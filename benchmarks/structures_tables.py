"""The tables and the plot of structures.py."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = (
    "test E", "test F", "test_ood E", "test_ood F", "long E", "long F", "lasted", "drift", "own F",
)  # fmt: skip


def write_tables(
    name: str, rows: Sequence[dict[str, Any]], names: Mapping[str, str], out: Path
) -> str:
    """A CSV of all students, a table of means and standard deviations over seeds, and a plot.

    ``names`` are those of the ways, in order, of which the first is no way but what was before.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"structures_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["way", "seed", "added", *COLUMNS])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"`python benchmarks/structures.py --sets {name} --seeds {' '.join(map(str, seeds))}`; "
        "mean and standard deviation over seeds; E in meV, F in meV/Å; `long`: frames of the "
        "teacher's long dynamics; of the student's NVE dynamics those that lasted (%), the median "
        "drift of the total energy (meV/atom/ps), and the error of its forces on its own way.",
        "",
        "| added | structures | " + " | ".join(COLUMNS) + " | seeds |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    for way, label in names.items():
        own = [row for row in rows if row["way"] == way]
        if own:
            cells = [_cell([row[column] for row in own]) for column in COLUMNS]
            added = "-".join(map(str, sorted({row["added"] for row in own})))
            lines.append(f"| {label} | {added} | {' | '.join(cells)} | {len(own)} |")
    text = "\n".join(lines) + "\n"
    (out / f"structures_{name}.md").write_text(text, encoding="utf-8")
    _plot(name, rows, dict(list(names.items())[1:]), out / f"structures_{name}.png")
    return text


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{_digits(mean(known))}f}" if len(known) > 1 else ""
    return f"{mean(known):.{_digits(mean(known))}f}{spread}"


def _digits(value: float) -> int:
    return 0 if abs(value) >= 20 else 1


def _plot(name: str, rows: Sequence[dict[str, Any]], names: Mapping[str, str], path: Path) -> None:
    from matplotlib.figure import Figure

    ways = [way for way in names if any(row["way"] == way for row in rows)]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    shown = {"test F": "test", "long F": "teacher's long dynamics", "own F": "student's own way"}
    shown["test_ood F"] = "unseen systems"
    for panel, (column, title) in zip(panels, shown.items(), strict=True):
        for place, way in enumerate(ways):
            values = [row[column] for row in rows if row["way"] == way]
            panel.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            panel.plot([mean(values)], [place], "|", color="k", markersize=14)
        panel.set_title(title, size=10)
        panel.set_xlabel("force error (meV/Å)")
    panels[0].set_yticks(range(len(ways)), [names[way] for way in ways])
    panels[0].invert_yaxis()
    figure.suptitle(f"{name}: what was added", size=11)
    figure.savefig(path, dpi=150)
