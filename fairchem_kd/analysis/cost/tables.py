"""What models cost, at inference and in training: the report.

    models, batches -> inference.measure_inference ┐
    calculators     -> inference.measure_md        ├ Costs -> tables, as_dict, figures, write
    distilled runs  -> training_cost.measure_training ┘

``fairchem-kd cost`` is these functions on the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairchem_kd.analysis.cost.study import FORMAT, Costs, conditions
from fairchem_kd.analysis.cost.timing import Timing
from fairchem_kd.analysis.cost.training import DISTILLED, PLAIN, TrainingCost
from fairchem_kd.files import plain
from fairchem_kd.report.tables import Table, significant

if TYPE_CHECKING:
    pass


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
