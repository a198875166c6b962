"""Figures of what models and trainings cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fairchem_kd.analysis.cost.study import Costs
from fairchem_kd.analysis.cost.training import DISTILLED, PLAIN, TrainingCost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = 0.02  #: parts that are less than this share of every step are drawn as one


OTHER = "everything else"


#: Colour (a place in the palette) and hatch of parts of a step; hatches tell them apart in grey.
LOOKS = {
    "student forward": (1, ""),
    "backward": (5, "\\\\"),
    "teacher forward": (2, "//"),
    "companions": (6, ".."),
    "optimiser": (3, "xx"),
}


HATCHES = ("--", "||", "++", "oo")  # of the others


def figures(costs: Costs) -> dict[str, Figure]:
    """By file name: of inference and of training, as far as they were measured."""
    drawn = {}
    if costs.inference:
        drawn["cost_inference"] = plot_inference(costs)
    if costs.training:
        drawn["cost_training"] = plot_training(costs)
    return drawn


def plot_inference(costs: Costs) -> Figure:
    """Throughput and memory against the batch size."""
    from fairchem_kd.report.figures import legend, logarithmic, new_figure, style

    figure = new_figure(9.0, 3.8)
    speed_axes, memory_axes = figure.subplots(1, 2)
    for number, (label, speeds) in enumerate(costs.inference.items()):
        sizes = [speed.systems for speed in speeds]
        rates = np.array([speed.systems_per_second for speed in speeds])
        quartiles = np.array([speed.timing.quartiles for speed in speeds])
        limits = np.array(sizes)[:, None] / quartiles[:, ::-1]
        spread = np.abs(limits - rates[:, None]).T
        speed_axes.errorbar(sizes, rates, spread, label=label, capsize=2, **style(number))
        memory = [speed.peak_memory / 1e6 for speed in speeds]
        memory_axes.plot(sizes, memory, label=label, **style(number))
    speed_axes.set_ylabel("throughput (systems/s)")
    memory_axes.set_ylabel("peak memory of a forward (MB)")
    for axes in (speed_axes, memory_axes):
        for which in ("x", "y"):
            logarithmic(axes, which)
        axes.set_xlabel("batch size (systems)")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    legend(figure, speed_axes)
    return figure


def drawn_parts(cost: TrainingCost, way: str) -> dict[str, float]:
    """Milliseconds of the parts of a step, the small ones as one."""
    whole = {w: sum(t.median for t in parts.values()) for w, parts in cost.anatomy.items()}
    drawn: dict[str, float] = {}
    for part, timing in cost.anatomy[way].items():
        share = max(
            parts[part].median / whole[w] for w, parts in cost.anatomy.items() if part in parts
        )
        name = part if share >= SMALL else OTHER
        drawn[name] = drawn.get(name, 0.0) + 1000 * timing.median
    return drawn


def plot_training(costs: Costs) -> Figure:
    """The parts of a step, plain and distilled, as bars."""
    from fairchem_kd.report.figures import COLOURS, new_figure

    bars = [(label, way) for label in costs.training for way in (PLAIN, DISTILLED)]
    steps = [drawn_parts(costs.training[label], way) for label, way in bars]
    parts = sorted(dict.fromkeys(p for step in steps for p in step), key=lambda p: p == OTHER)
    figure = new_figure(8.5, 1.9 + 0.42 * len(bars) + 0.22 * (len(parts) // 4))
    axes = figure.subplots()
    left = np.zeros(len(bars))
    rest = [part for part in parts if part not in LOOKS and part != OTHER]
    places = LOOKS | {part: (4, HATCHES[n % len(HATCHES)]) for n, part in enumerate(rest)}
    looks = {part: (COLOURS[place], hatch) for part, (place, hatch) in places.items()}
    looks[OTHER] = "0.7", ""
    for part in parts:
        colour, hatch = looks[part]
        widths = [step.get(part, 0.0) for step in steps]
        axes.barh(
            range(len(bars)),
            widths,
            left=left,
            label=part,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
        left += widths
    axes.set_yticks(range(len(bars)), [f"{label}: {way} step" for label, way in bars])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, data aside (ms)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
