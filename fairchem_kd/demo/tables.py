"""What a demo showed, as a table."""

from __future__ import annotations

from fairchem_kd.analysis.compare.comparison import Comparison
from fairchem_kd.report.tables import Table

_TARGETS = {"energy_mae": "E", "forces_mae": "F"}


def table(comparison: Comparison) -> Table:
    """Errors on every split, training seconds and throughput."""
    from fairchem_kd.analysis.compare.tables import metric
    from fairchem_kd.report.tables import Table, significant, with_spread

    shown = {"energy_mae": "E", "forces_mae": "F", "forces_cosine_similarity": "cos F"}
    header = ["model"]
    header += [f"{name} {split.name}" for split in comparison.splits for name in shown.values()]
    speed = next(iter(comparison.throughputs.values()))
    unit = "s" if "cuda" in speed.device else "CPU s"
    made = Table("Errors", [*header, "steps", f"training ({unit})", "systems/s"])
    for group in comparison.groups:
        seconds = [value for value in group.training_seconds if value is not None]
        made.add(
            group.label,
            *(
                metric(split.evaluations[group.label], name)
                for split in comparison.splits
                for name in shown
            ),
            "-" if group.steps is None else str(group.steps),
            with_spread(seconds, 0),
            significant(comparison.throughputs[group.label].systems_per_second),
        )
    where = speed.device if "cuda" in speed.device else f"{speed.device}, {speed.threads} thread(s)"
    atoms = "free atoms" if comparison.free_atoms else "all atoms"
    made.notes.append(
        f"E: energy MAE in meV; F: force MAE in meV/Å and cos F: force cosine, on {atoms}. Systems "
        f"per second: inference in batches of {speed.batch_size}, alone on the machine ({where})."
    )
    if any(len(group.files) > 1 for group in comparison.groups):
        made.notes.append("Mean and standard deviation over seeds.")
    return made


def gaps(comparison: Comparison) -> Table:
    """The gap closed on every split and target, with interval and verdict."""
    from fairchem_kd.analysis.compare.tables import closed, gap_notes
    from fairchem_kd.report.tables import Table

    columns = [(split, target) for split in comparison.splits for target in _TARGETS]
    header = [f"{_TARGETS[target]} {split.name}" for split, target in columns]
    made = Table("Gap closed between plain student and teacher", ["model", *header])
    every = []
    for label in comparison.baselines:
        cells = [label]
        for split, target in columns:
            gap = next((gap for gap in split.gaps[label] if gap.target == target), None)
            cells.append("-" if gap is None else f"{closed(gap)}, {gap.verdict}")
            every += [] if gap is None else [gap]
        made.add(*cells)
    made.notes += gap_notes(every)
    return made
