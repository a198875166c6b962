"""What models cost, at inference and in training: the report.

    models, batches -> inference.measure_inference ┐
    calculators     -> inference.measure_md        ├ Costs -> tables, as_dict, figures, write
    distilled runs  -> training_cost.measure_training ┘

``fairchem-kd cost`` is these functions on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.inference import Speed
from fairchem_kd.analysis.output import write_json, write_plots, write_tables
from fairchem_kd.analysis.tables import Table, significant
from fairchem_kd.analysis.timing import Timing
from fairchem_kd.analysis.training_cost import DISTILLED, PLAIN, TrainingCost
from fairchem_kd.records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
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


@dataclass
class Costs:
    """What was measured; models by label, the teacher first."""

    circumstances: dict[str, Any]
    data: str
    parameters: dict[str, int]
    inference: dict[str, list[Speed]] = field(default_factory=dict)
    md: dict[str, Timing] = field(default_factory=dict)
    md_atoms: int = 0
    training: dict[str, TrainingCost] = field(default_factory=dict)


def conditions(costs: Costs) -> str:
    """Device, threads and the rest, in one sentence."""
    known = costs.circumstances
    words = [str(known["device"])]
    if "cuda" not in str(known.get("kind", "")):
        words.append(f"{known['threads']} thread(s)")
        if known["flush_denormal"]:
            words.append("denormals flushed to zero")
    words.append(f"PyTorch {known['torch']}")
    return f"On {', '.join(words)}."


def tables(costs: Costs) -> list[Table]:
    """Inference, MD, overhead, and the parts of a step, as far as they were measured."""
    made = []
    if costs.inference:
        made.append(inference_table(costs))
    if costs.training:
        made.append(overhead_table(costs))
        made += [anatomy_table(costs, label) for label in costs.training]
    return made


def inference_table(costs: Costs) -> Table:
    """Every model at every batch size."""
    header = ["model", "parameters", "batch", "atoms", "ms per batch", "systems/s", "atoms/s"]
    header += ["peak memory (MB)", *(["ms per MD step"] if costs.md else [])]
    table = Table("Inference", header)
    for label, speeds in costs.inference.items():
        for number, speed in enumerate(speeds):
            cells = [
                label,
                f"{costs.parameters[label] / 1e6:.2f} M",
                str(speed.systems),
                str(speed.atoms),
                milliseconds(speed.timing),
                significant(speed.systems_per_second),
                significant(speed.atoms_per_second),
                significant(speed.peak_memory / 1e6),
            ]
            if costs.md:
                cells.append(milliseconds(costs.md[label]) if number == 0 else "")
            table.add(*cells)
    table.notes.append(
        f"{conditions(costs)} Structures of {costs.data}. Neighbour search included; median "
        "[quartiles] of repeats in which the models take turns. Peak memory: tensors of one "
        "forward, beyond weights and batch."
    )
    if costs.md:
        table.notes.append(
            f"MD: NVE in ASE through stock fairchem's OCPCalculator, {costs.md_atoms} atoms."
        )
    return table


def overhead_table(costs: Costs) -> Table:
    """What a step and an epoch cost with and without distillation."""
    table = Table(
        "A step of training",
        ["run", "batch", "companions", "data (ms)", "plain (ms)", "distilled (ms)", "ratio",
         "plain epoch (s)", "distilled epoch (s)", "plain memory (MB)", "distilled memory (MB)"],
    )  # fmt: skip
    for label, cost in costs.training.items():
        low, high = cost.overhead.quartiles
        table.add(
            label,
            str(cost.batch_size),
            f"{cost.companions:.0f}",
            milliseconds(cost.data),
            milliseconds(cost.plain),
            milliseconds(cost.distilled),
            f"{cost.overhead.median:.2f} [{low:.2f}, {high:.2f}]",
            significant(cost.epoch(PLAIN)),
            significant(cost.epoch(DISTILLED)),
            significant(cost.peak_memory[PLAIN] / 1e6),
            significant(cost.peak_memory[DISTILLED] / 1e6),
        )
    table.notes.append(
        f"{conditions(costs)} The same student on the same batches with and without distillation, "
        "turn by turn; ratio: the median over turns [quartiles]. Data: reading and collating in "
        "this process, which loader processes can hide. Epochs without evaluations."
    )
    if any(cost.companions for cost in costs.training.values()):
        table.notes.append(
            "Companions: unlabelled structures and rattled copies, which a distilled step has "
            "beside its batch; the ratio counts them in."
        )
    return table


def anatomy_table(costs: Costs, label: str) -> Table:
    """Where the time of a step goes."""
    cost = costs.training[label]
    table = Table(f"Where the time goes ({label})", ["part", "plain (ms)", "distilled (ms)", "%"])
    plainly, distilled = cost.anatomy[PLAIN], cost.anatomy[DISTILLED]
    whole = sum(timing.median for timing in distilled.values())
    for part in parts_of(cost):
        taken = distilled.get(part)
        table.add(
            part,
            milliseconds(plainly[part]) if part in plainly else "-",
            milliseconds(taken) if taken else "-",
            f"{100 * taken.median / whole:.0f}" if taken else "-",
        )
    table.notes.append(
        "Turns of their own, in which every part waits for the device. Backward: with clipping. "
        "Taps: what reading features adds to a forward, sums over edges among it."
    )
    return table


def parts_of(cost: TrainingCost) -> list[str]:
    """Every part of either way, those of plain training first."""
    return list(dict.fromkeys([*cost.anatomy[PLAIN], *cost.anatomy[DISTILLED]]))


def milliseconds(timing: Timing) -> str:
    """``12.3 [11.9, 13.0]``."""
    low, high = timing.quartiles
    middle = significant(1000 * timing.median)
    return f"{middle} [{significant(1000 * low)}, {significant(1000 * high)}]"


def as_dict(costs: Costs) -> dict[str, Any]:
    """Everything in the tables and more, of plain values; seconds and bytes."""
    return plain(
        {
            "format": FORMAT,
            "circumstances": costs.circumstances,
            "data": costs.data,
            "parameters": costs.parameters,
            "inference": {
                label: [speed.as_dict() for speed in speeds]
                for label, speeds in costs.inference.items()
            },
            "md": {
                "atoms": costs.md_atoms,
                "per_step": {label: timing.as_dict() for label, timing in costs.md.items()},
            },
            "training": {label: cost.as_dict() for label, cost in costs.training.items()},
        }
    )


def write(costs: Costs, folder: Path, *, with_plots: bool = True) -> list[Path]:
    """Write cost.md, cost.json and, if asked for, the plots into ``folder``; returns the files.

    Raises:
        UserError: plots are asked for and matplotlib is missing.
    """
    written = [
        write_tables(folder / "cost.md", tables(costs)),
        write_json(folder / "cost.json", as_dict(costs)),
    ]
    if with_plots:
        written += write_plots(folder, figures(costs))
    return written


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
    from fairchem_kd.analysis.plots import legend, logarithmic, new_figure, style

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
    from fairchem_kd.analysis.plots import COLOURS, new_figure

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
