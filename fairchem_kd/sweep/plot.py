"""The picture of a sweep: each metric over the points, every seed as a dot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_kd.errors import UserError
from fairchem_kd.files import write_whole
from fairchem_kd.sweep.collect import CONFIDENCE, Row
from fairchem_kd.sweep.columns import short_keys, swept_keys, titles

#: Seeds of which an interval is drawn: that of two is some 13 times as wide as they are apart.
FEWEST = 3
#: Panels in a row.
ACROSS = 3


def plot(path: Path, rows: Sequence[Row], metrics: Sequence[str], title: str) -> Path:
    """Write the figure to ``path``: over the value of the one key that is swept where that is a
    number (on a logarithmic axis where the values span a decade), else over the points' names.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the plot needs matplotlib: pip install 'fairchem-kd[plots]', or give --no-plot."
        ) from None
    rows = [row for row in rows if row.metrics]
    places, name = _numbers(rows)
    told = titles([row.runs[0] for row in rows])
    across = min(len(metrics), ACROSS)
    down = -(-len(metrics) // across)
    figure = Figure(figsize=(1.0 + 3.5 * across, 0.6 + 3.0 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    for panel, metric in zip(panels, metrics, strict=False):
        for place, row in zip(places, rows, strict=True):
            found = row.metrics.get(metric)
            if found is None:
                continue
            half = found.half if len(found.values) >= FEWEST else _standard_error(found.values)
            panel.errorbar(place, found.mean, yerr=half or 0, fmt="_", color="C0", capsize=4)
            seeds = [place] * len(found.values)
            panel.plot(seeds, found.values, "o", color="C1", fillstyle="none", markersize=5)
        panel.set_title(f"{metric} ({unit})" if (unit := unit_of(metric)) else metric)
        if name is None:
            panel.set_xticks(places, list(told.values()), rotation=30, ha="right")
        else:
            panel.set_xlabel(name)
            _set_scale(panel, places)
    few = any(len(found.values) < FEWEST for row in rows for found in row.metrics.values())
    bars = f"{CONFIDENCE:.0%} interval" + (" (of two seeds: standard error)" if few else "")
    figure.suptitle(f"{title}: each seed, their mean and its {bars}", size=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=150)
    return write_whole(path, lambda file: file.write(buffer.getvalue()))


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 of one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def unit_of(metric: str) -> str:
    """The unit of a validation's metric; empty for a ratio or a loss."""
    if not metric.endswith(("mae", "mse", "magnitude_error")):
        return ""
    unit = {"energy": "eV", "forces": "eV/Å"}.get(metric.partition("_")[0], "")
    return f"({unit})²" if unit and metric.endswith("mse") else unit


def _set_scale(panel: Any, places: Sequence[float]) -> None:
    """Logarithmic over a decade or more; with a 0 among the values, linear around it.

    Ticks are the values themselves.
    """
    positive = [place for place in places if place > 0]
    if not positive or max(positive) < 10 * min(positive):
        return
    if min(places) > 0:
        panel.set_xscale("log")
    else:
        panel.set_xscale("symlog", linthresh=min(positive))
    if len(places) <= 10:
        panel.set_xticks(places, [f"{place:g}" for place in places])
        panel.minorticks_off()


def _numbers(rows: Sequence[Row]) -> tuple[list[float], str | None]:
    """The value of the one swept key at each row, and its name; else 0, 1, ... and None."""
    keys = swept_keys([run for row in rows for run in row.runs])
    if len(keys) == 1 and not any(run.label for row in rows for run in row.runs):
        values = [row.values.get(keys[0]) for row in rows]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return [float(v) for v in values if v is not None], short_keys(keys)[keys[0]]
    return [float(i) for i in range(len(rows))], None
