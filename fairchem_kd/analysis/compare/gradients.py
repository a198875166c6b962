"""What each term did to a student beside its labels: cosines and lengths of gradients, as recorded.

Only of runs with ``task.distillation.diagnostics``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fairchem_kd.analysis.compare.comparison import TEACHER, Comparison
from fairchem_kd.distillation.gradients import COSINE, NORM
from fairchem_kd.distillation.summing import LABEL_LOSS
from fairchem_kd.report.figures import legend, logarithmic, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float, float]]  #: step, cosine, length over that of the labels' gradient


def gradient_curves(comparison: Comparison) -> dict[str, dict[str, Points]]:
    """By label and term, what the first seed with such records holds."""
    curves = {}
    for group in comparison.groups:
        if group.role == TEACHER:
            continue
        for file in group.files:
            if found := _of_run(file.records("train")):
                curves[group.label] = found
                break
    return curves


def _of_run(records: list[dict[str, Any]]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    last: dict[str, tuple[float, float]] = {}
    for record in records:
        metrics = record.get("metrics")
        if not isinstance(metrics, dict):
            continue
        length = metrics.get(f"{LABEL_LOSS}_{NORM}")
        for name, cosine in metrics.items():
            term = name.removesuffix(f"_{COSINE}")
            norm = metrics.get(f"{term}_{NORM}")
            if term == name or not (_is_number(cosine) and _is_number(norm)):
                continue
            if not _is_number(length) or not length:
                continue
            point = float(cosine), float(norm or 0.0) / float(length)
            if last.get(term) != point:  # a value stands in every line until the next look
                last[term] = point
                found.setdefault(term, []).append((int(record["step"]), *point))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plot_gradients(comparison: Comparison) -> Figure | None:
    """Cosines with the labels' gradient, and lengths, a column for each run; None without any."""
    curves = gradient_curves(comparison)
    if not curves:
        return None
    figure = new_figure(1.6 + 3.4 * len(curves), 5.2)
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col", sharey="row")
    names = list(dict.fromkeys(term for one in curves.values() for term in one))
    for column, (label, terms) in enumerate(curves.items()):
        above, below = panels[0][column], panels[1][column]
        for term, points in terms.items():
            looks = {**style(names.index(term)), "markersize": 3.5, "linewidth": 1.2}
            steps, cosines, lengths = zip(*points, strict=True)
            above.plot(steps, cosines, label=term, **looks)
            if any(length > 0 for length in lengths):
                below.plot(steps, [x if x > 0 else math.nan for x in lengths], **looks)
        above.axhline(0.0, color="0.6", linewidth=1, zorder=0)
        below.axhline(1.0, color="0.6", linewidth=1, zorder=0)
        above.set_title(label, fontsize=9)
        above.set_ylim(-1.05, 1.05)
        below.set_xlabel("optimiser steps")
        for axes in (above, below):
            axes.grid(which="both", color="0.92")
            axes.set_axisbelow(True)
    logarithmic(panels[1][0], "y")
    panels[0][0].set_ylabel("cosine with the labels' gradient")
    panels[1][0].set_ylabel("length over that of the labels'")
    known = max(range(len(curves)), key=lambda i: len(list(curves.values())[i]))
    legend(figure, panels[0][known])
    return figure
