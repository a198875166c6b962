"""Plots of models as potentials: the figures with their errors, dynamics, ends, bond scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.physics.dynamics import Dynamics
from fairchem_kd.analysis.physics.measure import Array
from fairchem_kd.analysis.physics.study import Physics
from fairchem_kd.analysis.physics.summary import Measured, summarise
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

#: Figures that differ by orders of magnitude among models, and are never negative.
DECADES = ("md_drift",)
WINDOW = 0.1  #: ps, over which the total energy's coming and going is averaged away
_LINEAR = 5.0  #: meV, up to which energies of relaxations are drawn to scale


def figures(found: Physics) -> dict[str, Figure]:
    """By file name."""
    return {
        "physics_summary": plot_summary(found),
        "physics_dynamics": plot_dynamics(found),
        "physics_drift": plot_drift(found),
        "physics_relaxations": plot_relaxations(found),
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
        if name in DECADES:
            _by_decades(axes, [s[name] for s in summaries.values()], factor)
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


def plot_drift(found: Physics) -> Figure:
    """How far the total energy has gone over time: median over structures and seeds, by decades.

    Of each run the mean over a moving window of :data:`WINDOW`, so that what comes and goes within
    a vibration is not counted; shaded to the quartiles.
    """
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for place, label in enumerate(found.labels):
        runs = [run for one in found.models[label] for run in one.dynamics]
        times, gone = gone_from_start(runs)
        if not len(times):
            continue
        low, middle, high = np.nanquantile(1000 * gone, [0.25, 0.5, 0.75], axis=0)
        looks = {**style(place), "markersize": 4, "markevery": max(1, len(times) // 8)}
        axes.plot(times, middle, label=label, **looks)
        axes.fill_between(times, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("time (ps)")
    axes.set_ylabel("|change of total energy| (meV/atom)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    legend(figure, axes)
    return figure


def gone_from_start(runs: Sequence[Dynamics]) -> tuple[Array, Array]:
    """How far the total energy is from where it was in the first window.

    Args:
        runs: of one time step; those that ended early have NaN behind their end.

    Returns:
        Times ``(T,)`` in ps of the middle of each window, and ``(runs, T)`` in eV per atom.
    """
    longest = max((len(run.energy) for run in runs), default=0)
    if longest < 4:
        return np.zeros(0), np.zeros((len(runs), 0))
    step = runs[0].time_step / 1000
    width = min(max(1, round(WINDOW / step)), longest // 4)
    gone = np.full((len(runs), longest - width + 1), np.nan)
    for row, run in zip(gone, runs, strict=True):
        if len(run.energy) >= width:
            means = np.convolve(run.energy, np.full(width, 1 / width), mode="valid")
            row[: len(means)] = np.abs(means - means[0])
    times = step * (np.arange(gone.shape[1]) + (width - 1) / 2)
    known = np.isfinite(gone).any(axis=0)
    known[:width] = False  # windows that share steps with the first
    return times[known], gone[:, known]


def plot_relaxations(found: Physics) -> Figure:
    """Where each relaxation ends, over the method's own end; to scale near 0, then by decades."""
    figure = new_figure(6.0, 0.9 + 0.45 * len(found.labels))
    axes = figure.subplots()
    chance = np.random.default_rng(0)  # so that equal ones do not cover each other
    for place, label in enumerate(found.labels):
        looks = style(place)
        for one in found.models[label]:
            for end in one.relaxations:
                if end.energy_above is None:
                    continue
                whole = {"color": looks["color"], "marker": looks["marker"], "markersize": 5}
                fill = looks["color"] if end.converged else "none"
                height = place + chance.uniform(-0.25, 0.25)
                axes.plot(
                    1000 * end.energy_above, height, ls="", alpha=0.7, **whole,
                    markerfacecolor=fill,
                )  # fmt: skip
    axes.axvspan(-_LINEAR, _LINEAR, color="0.92", zorder=0)
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("energy above the method's own end (meV); hollow: not converged", fontsize=9)
    axes.set_yticks(range(len(found.labels)), found.labels)
    axes.set_ylim(len(found.labels) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure


def _by_decades(axes: Axes, measured: Sequence[Measured | None], factor: float) -> None:
    """A logarithmic axis, where all values have a logarithm."""
    values = [factor * one.value for one in measured if one is not None]
    if min(values, default=0.0) <= 0:
        return
    lowest = [
        factor * one.over_structures[0]
        for one in measured
        if one is not None and one.over_structures is not None and one.over_structures[0] > 0
    ]
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min([*values, *lowest]), 2 * max(axes.dataLim.x1, *values))


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
