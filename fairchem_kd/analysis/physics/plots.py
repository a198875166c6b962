"""Plots of models as potentials: the figures with their errors, dynamics, bond scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.physics.study import Physics
from fairchem_kd.analysis.physics.summary import summarise
from fairchem_kd.report.figures import legend, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Figure -> the axis' label and the factor to its unit.
SHOWN = {
    "md_drift": ("NVE drift (meV/atom/ps)", 1000.0),
    "force_mismatch": ("|F + dE/dx| (meV/Å)", 1000.0),
    "relax_energy_above": ("relaxed energy above the method's (meV)", 1000.0),
    "scan_error": ("energy error along a bond (meV)", 1000.0),
}


def figures(found: Physics) -> dict[str, Figure]:
    """By file name."""
    return {
        "physics_summary": plot_summary(found),
        "physics_dynamics": plot_dynamics(found),
        "physics_scans": plot_scans(found),
    }


def plot_summary(found: Physics) -> Figure:
    """The main figures, with 95 % intervals over structures; seeds as small marks."""
    summaries = {label: found.summary(label) for label in found.labels}
    shown = [name for name in SHOWN if any(one[name] is not None for one in summaries.values())]
    rows = (len(shown) + 1) // 2
    figure = new_figure(8.0, 0.5 + (0.7 + 0.28 * len(summaries)) * rows)
    panels = figure.subplots(rows, 2, squeeze=False, sharey=True)
    truth = None if found.method is None else found.models[found.method][0]
    for axes, name in zip(panels.flat, shown, strict=False):
        label, factor = SHOWN[name]
        for place, (model, summary) in enumerate(summaries.items()):
            measured = summary[name]
            if measured is None:
                continue
            looks = style(place)
            value = factor * measured.value
            spread = None
            if measured.over_structures is not None:
                low, high = measured.over_structures
                spread = [[max(0.0, value - factor * low)], [max(0.0, factor * high - value)]]
            axes.errorbar(
                value, place, xerr=spread, fmt=looks["marker"], color=looks["color"], capsize=3
            )
            each = [summarise([one], truth, resamples=1)[name] for one in found.models[model]]
            if len(each) > 1:
                values = [factor * one.value for one in each if one is not None]
                axes.plot(values, [place] * len(values), "|", color=looks["color"], ms=11)
        axes.set_xlabel(label, fontsize=9)
        low, high = min(0.0, axes.dataLim.x0), max(0.0, axes.dataLim.x1)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_yticks(range(len(summaries)), list(summaries))
        axes.set_ylim(len(summaries) - 0.5, -0.5)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    return figure


def plot_dynamics(found: Physics) -> Figure:
    """Total energy against time, a panel for each of the first structures."""

    def draw(axes: Axes, label: str, index: int, looks: dict[str, Any]) -> None:
        run = found.models[label][0].dynamics[index]
        times = run.time_step * np.arange(len(run.energy))
        looks = {**looks, "markevery": max(1, len(times) // 6)}
        axes.plot(times, 1000 * np.array(run.energy), label=label, **looks)
        axes.set_xlabel("time (fs)")

    return _panels(found, draw, "change of total energy (meV/atom)")


def plot_scans(found: Physics) -> Figure:
    """Energy along the bonds of the first structures, counted from its lowest value."""

    def draw(axes: Axes, label: str, index: int, looks: dict[str, Any]) -> None:
        scan = found.models[label][0].scans[index]
        if scan is not None:
            energies = np.array(scan.energies) - min(scan.energies)
            axes.plot(scan.lengths, energies, label=label, **{**looks, "markevery": 3})
            axes.set_xlabel(f"{scan.bond} distance (Å)")

    return _panels(found, draw, "energy over its lowest (eV)")


def _panels(
    found: Physics, draw: Callable[[Axes, str, int, dict[str, Any]], None], y_label: str
) -> Figure:
    """A panel for each of the first structures; ``draw`` draws a model's first seed there."""
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
