"""Plots of a Comparison, as PNG and SVG.

Every model has a marker and a line style of its own beside its colour (Okabe and Ito's palette,
ordered by lightness), so that plots can be read in grey and by colour-blind people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.compare.comparison import TEACHER, Comparison
from fairchem_kd.analysis.compare.curves import learning_curves
from fairchem_kd.analysis.compare.gradients import plot_gradients
from fairchem_kd.report.figures import legend, logarithmic, new_figure, plain_numbers, style
from fairchem_kd.text import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = {
    "energy_mae": ("energy MAE", "meV", 1000.0),
    "forces_mae": ("force MAE", "meV/Å", 1000.0),
}


def figures(comparison: Comparison) -> dict[str, Figure]:
    """By file name: every plot for which there is something to draw."""
    drawn: dict[str, Figure | None] = {
        "errors": plot_errors(comparison),
        "front": plot_front(comparison),
        "pareto": plot_pareto(comparison),
        "learning_curves": plot_learning_curves(comparison),
        "gradients": plot_gradients(comparison),
    }
    for split in comparison.splits:
        drawn[f"parity_{split.name}"] = plot_parity(comparison, split.name)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def plot_errors(comparison: Comparison) -> Figure:
    """The errors of every model, a panel for each target and split; seeds as small marks."""
    splits = comparison.splits
    labels = [group.label for group in comparison.groups]
    figure = new_figure(1.5 + 3.1 * len(TARGETS), 0.9 + (0.55 + 0.3 * len(labels)) * len(splits))
    panels = figure.subplots(len(splits), len(TARGETS), squeeze=False, sharey=True)
    for row, split in zip(panels, splits, strict=True):
        for axes, (target, (name, unit, factor)) in zip(row, TARGETS.items(), strict=True):
            for number, group in enumerate(comparison.groups):
                values = [
                    factor * e.metrics[target]
                    for e in split.evaluations[group.label]
                    if target in e.metrics
                ]
                if not values:
                    continue
                looks = style(number)
                mean = float(np.mean(values))
                axes.plot(mean, number, looks["marker"], color=looks["color"], markersize=8)
                if len(values) > 1:
                    axes.plot(values, [number] * len(values), "|", color=looks["color"], ms=11)
                if group.role == TEACHER:
                    axes.axvline(mean, color="0.6", linestyle=":", linewidth=1, zorder=0)
            axes.set_xlim(0, 1.08 * axes.dataLim.x1)
            axes.grid(axis="x", color="0.9")
            axes.set_axisbelow(True)
            axes.set_xlabel(f"{name} on {split.name} ({unit})")
        row[0].set_yticks(range(len(labels)), labels)
        row[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def plot_front(comparison: Comparison) -> Figure | None:
    """Force errors against energy errors, a panel for each split: weights trade one for the other.

    A model is better than another where it lies further down and to the left; seeds are small
    marks. None where no split has both errors.
    """
    targets = list(TARGETS)
    known = [
        split
        for split in comparison.splits
        if any(set(targets) <= e.metrics.keys() for es in split.evaluations.values() for e in es)
    ]
    if not known:
        return None
    figure = new_figure(1.8 + 3.6 * len(known), 3.7)
    panels = figure.subplots(1, len(known), squeeze=False)[0]
    for axes, split in zip(panels, known, strict=True):
        for number, group in enumerate(comparison.groups):
            both = [
                [TARGETS[target][2] * e.metrics[target] for target in targets]
                for e in split.evaluations[group.label]
                if set(targets) <= e.metrics.keys()
            ]
            if not both:
                continue
            looks = {**style(number), "linestyle": "none"}
            energies, forces = zip(*both, strict=True)
            axes.plot(np.mean(energies), np.mean(forces), label=group.label, markersize=8, **looks)
            if len(both) > 1:
                axes.plot(energies, forces, **looks, markersize=3.5, alpha=0.6)
        for axis in ("x", "y"):
            logarithmic(axes, axis)
        axes.margins(0.1)
        for target, label in zip(targets, (axes.set_xlabel, axes.set_ylabel), strict=True):
            name, unit, _ = TARGETS[target]
            label(f"{name} on {split.name} ({unit})")
        axes.grid(which="both", color="0.92")
        axes.set_axisbelow(True)
    legend(figure, panels[0])
    return figure


def plot_pareto(comparison: Comparison) -> Figure | None:
    """Error against throughput, the teacher among them; None where no speed was measured."""
    if not comparison.throughputs:
        return None
    split = comparison.splits[0]
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, len(TARGETS))
    for axes, (target, (name, unit, factor)) in zip(panels, TARGETS.items(), strict=True):
        for number, group in enumerate(comparison.groups):
            values = [
                e.metrics[target] for e in split.evaluations[group.label] if target in e.metrics
            ]
            speed = comparison.throughputs.get(group.label)
            if not values or speed is None:
                continue
            looks = {**style(number), "linestyle": "none"}
            axes.plot(
                speed.systems_per_second,
                factor * float(np.mean(values)),
                label=group.label,
                markersize=8,
                **looks,
            )
        logarithmic(axes, "x")
        axes.margins(x=0.1)
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.set_xlabel("throughput (systems/s)")
        axes.set_ylabel(f"{name} on {split.name} ({unit})")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    legend(figure, panels[0])
    return figure


def plot_learning_curves(comparison: Comparison) -> Figure | None:
    """Validation errors against steps and seconds, out of the runs' records; None without any."""
    curves = learning_curves(comparison)
    if not curves:
        return None
    figure = new_figure(9.0, 6.4)
    panels = figure.subplots(2, len(TARGETS), squeeze=False)
    numbers = {group.label: number for number, group in enumerate(comparison.groups)}
    for row, x in zip(panels, ("step", "seconds"), strict=True):
        for axes, (target, (name, unit, factor)) in zip(row, TARGETS.items(), strict=True):
            for label, seeds in curves.items():
                looks = style(numbers[label])
                for number, points in enumerate(seeds):
                    known = [p for p in points if p["metrics"].get(target) is not None]
                    axes.plot(
                        [p[x] for p in known],
                        [factor * p["metrics"][target] for p in known],
                        label=label if number == 0 else None,
                        markersize=4,
                        linewidth=1.2,
                        **looks,
                    )
            logarithmic(axes, "y")
            axes.set_xlabel("optimiser steps" if x == "step" else "training time (s)")
            axes.set_ylabel(f"validation {name} ({unit})")
            axes.grid(which="both", color="0.92")
            axes.set_axisbelow(True)
    legend(figure, panels[0][0])
    return figure


def plot_parity(comparison: Comparison, split_name: str) -> Figure:
    """Predictions against labels on one split, a column for each model (its first seed).

    Colours say how many points fall together, on a logarithmic scale, which is one for a row.
    """
    split = next(split for split in comparison.splits if split.name == split_name)
    labels = list(split.evaluations)
    rows: list[tuple[str, str, str, Callable[[Any], bool]]] = [
        ("energy", "energy (eV)", "energy_mae", lambda parity: True),
        ("forces", "force component (eV/Å)", "forces_mae", lambda parity: "forces" in parity),
    ]
    figure = new_figure(1.0 + 2.0 * len(labels), 5.0)
    panels = figure.subplots(len(rows), len(labels), squeeze=False, sharex="row", sharey="row")
    for row, (key, title, target, known) in zip(panels, rows, strict=True):
        drawn = []
        for axes, label in zip(row, labels, strict=True):
            first = split.evaluations[label][0]
            parity = first.parity
            if not known(parity):
                axes.set_axis_off()
                continue
            truth, predicted = parity[f"{key}_label"], parity[key]
            low, high = float(truth.min()), float(truth.max())
            shown = axes.hexbin(
                truth.ravel(), predicted.ravel(), gridsize=60, mincnt=1, bins="log",
                cmap="cividis_r", linewidths=0.1, rasterized=True,
            )  # fmt: skip
            drawn.append(shown)
            axes.plot([low, high], [low, high], color="0.3", linewidth=0.8)
            axes.set_aspect("equal", adjustable="box")
            axes.set_title(label, fontsize=9)
            if target in first.metrics:
                _, unit, factor = TARGETS[target]
                told = f"MAE {digits(factor * first.metrics[target])} {unit}"
                axes.text(0.04, 0.96, told, transform=axes.transAxes, va="top", fontsize=7)
            axes.set_xlabel(f"label: {title}", fontsize=8)
            axes.tick_params(labelsize=8)
        row[0].set_ylabel(f"predicted {title}", fontsize=8)
        if drawn:
            most = max(float(one.get_array().max()) for one in drawn)
            for one in drawn:
                one.set_clim(1, max(most, 2))
            bar = figure.colorbar(drawn[-1], ax=list(row), label="points", fraction=0.03, pad=0.01)
            plain_numbers(bar.ax.yaxis)
    return figure
