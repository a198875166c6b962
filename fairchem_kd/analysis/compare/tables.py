"""A Comparison as tables for people, JSON for machines, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fairchem_kd.analysis.compare.comparison import STUDENT, Comparison, Group, SplitResult
from fairchem_kd.analysis.compare.evaluation import WITHIN
from fairchem_kd.analysis.compare.gap import NO_EVIDENCE, Gap
from fairchem_kd.files import plain
from fairchem_kd.report.tables import Table, percent, significant, with_spread

FORMAT = 1

#: Metric -> column, factor to its unit, digits.
COLUMNS: dict[str, tuple[str, float, int]] = {
    "energy_mae": ("E MAE (meV)", 1000.0, 1),
    "energy_mae_per_atom": ("E MAE (meV/atom)", 1000.0, 2),
    "forces_mae": ("F MAE (meV/Å)", 1000.0, 1),
    "forces_cosine_similarity": ("F cosine", 1.0, 3),
    "forces_magnitude_error": ("|F| error (meV/Å)", 1000.0, 1),
    "efwt": ("EFwT (%)", 100.0, 1),
    "efwt_5x": ("EFwT 5x (%)", 100.0, 1),
    "efwt_10x": ("EFwT 10x (%)", 100.0, 1),
}
_TARGET = {"energy_mae": "energy", "forces_mae": "forces"}


def tables(comparison: Comparison) -> list[Table]:
    """The models, the errors on each split, and the gaps closed on each split."""
    made = [models_table(comparison)]
    for split in comparison.splits:
        made.append(errors_table(comparison, split))
        if split.gaps:
            made.append(gap_table(comparison, split))
    return made


def _seeds(seeds: Sequence[int | None]) -> str:
    """``3 (0, 1, 2)``, since a 0 alone reads as none."""
    known = ", ".join("-" if seed is None else str(seed) for seed in seeds)
    return f"{len(seeds)} ({known})"


def models_table(comparison: Comparison) -> Table:
    """What each model is, what it was trained on, and how fast it is."""
    table = Table(
        "Models",
        ["model", "role", "seeds", "parameters", "labels from", "steps", "training (s)",
         "systems/s", "atoms/s"],
    )  # fmt: skip
    for group in comparison.groups:
        seconds = [value for value in group.training_seconds if value is not None]
        speed = comparison.throughputs.get(group.label)
        table.add(
            group.label,
            _role(comparison, group),
            _seeds(group.seeds),
            f"{comparison.parameters[group.label] / 1e6:.2f} M",
            str(group.files[0].labels_from or "-"),
            "-" if group.steps is None else str(group.steps),
            with_spread(seconds, 0),
            significant(speed.systems_per_second if speed else None),
            significant(speed.atoms_per_second if speed else None),
        )
    table.notes += unlike_baselines(comparison)
    speed = next(iter(comparison.throughputs.values()), None)
    if speed is not None:
        flushed = ", denormals flushed to zero" if speed.flush_denormal else ""
        threads = "" if "cuda" in speed.device else f", {speed.threads} thread(s){flushed}"
        table.notes.append(
            f"Throughput: batches of {speed.batch_size} with {speed.atoms:.0f} atoms, neighbour "
            f"search included, on {speed.device}{threads}."
        )
    return table


def unlike_baselines(comparison: Comparison) -> list[str]:
    """Where a model had another training than its baseline, besides the losses of distillation."""
    notes = []
    groups = {group.label: group for group in comparison.groups}
    for label, baseline in comparison.baselines.items():
        if label not in groups or baseline not in groups or label == baseline:
            continue
        model, other = groups[label], groups[baseline]
        unlike = []
        if None not in (model.steps, other.steps) and model.steps != other.steps:
            unlike.append(f"{model.steps} steps against {other.steps}")
        ours, theirs = model.files[0].labels_from, other.files[0].labels_from
        if ours != theirs:
            unlike.append(f"labels from {ours} against {theirs}")
        if unlike:
            notes.append(
                f"'{label}' and its baseline '{baseline}' differ in more than losses: "
                f"{'; '.join(unlike)}. What was gained may come from that."
            )
    return notes


def _role(comparison: Comparison, group: Group) -> str:
    if group.role != STUDENT:
        return group.role
    losses = ", ".join(group.files[0].losses)
    return losses or "plain"


def errors_table(comparison: Comparison, split: SplitResult) -> Table:
    """Every metric of every model on one split."""
    known = [
        name for name in COLUMNS if any(name in e[0].metrics for e in split.evaluations.values())
    ]
    table = Table(
        f"Errors on {split.name} ({split.path}: {split.systems} structures of "
        f"{split.trajectories} systems)",
        ["model", *(COLUMNS[name][0] for name in known)],
    )
    for label, evaluations in split.evaluations.items():
        table.add(label, *(metric(evaluations, name) for name in known))
    strict = WITHIN["efwt"]
    atoms = "free atoms" if comparison.free_atoms else "all atoms"
    table.notes.append(
        f"Forces on {atoms}. EFwT: energy within {strict[0]} eV and every force component within "
        f"{strict[1]} eV/Å; 5x and 10x: within five and ten times that."
    )
    if any(len(group.files) > 1 for group in comparison.groups):
        table.notes.append("Mean and standard deviation over seeds.")
    return table


def metric(evaluations: Sequence[Any], name: str) -> str:
    """A metric of a model's seeds in the unit of :data:`COLUMNS`; a dash where it has none."""
    _, factor, digits = COLUMNS[name]
    values = [factor * e.metrics[name] for e in evaluations if name in e.metrics]
    return with_spread(values, digits)


def gap_table(comparison: Comparison, split: SplitResult) -> Table:
    """The gap closed on each target, with intervals and verdicts."""
    every = [gap for gaps in split.gaps.values() for gap in gaps]
    by_seeds = any(gap.gain_over_seeds is not None for gap in every)
    header = ["model", "baseline"]
    for target in _TARGET.values():
        header += [f"{target} gap closed"]
        header += ["over seeds"] if by_seeds else []
        header += [f"{target} verdict"]
    table = Table(f"Gap closed on {split.name}", header)
    for label, gaps in split.gaps.items():
        cells = [label, comparison.baselines[label]]
        by_target = {gap.target: gap for gap in gaps}
        for target in _TARGET:
            gap = by_target.get(target)
            cells.append("-" if gap is None else closed(gap))
            if by_seeds:
                known = gap is not None and gap.closed_over_seeds is not None
                cells.append(percent(gap.closed, gap.closed_over_seeds) if gap and known else "-")
            cells.append("-" if gap is None else gap.verdict)
        table.add(*cells)
    table.notes += gap_notes(every)
    return table


def closed(gap: Gap) -> str:
    """``61 % [52, 70]``, or "undefined"."""
    return percent(gap.closed, gap.closed_over_systems) if gap.closed is not None else "undefined"


def gap_notes(gaps: Sequence[Gap]) -> list[str]:
    """What the reader of a table of gaps has to know."""
    notes = [
        "Gap closed: (baseline - model) / (baseline - teacher), of MAEs; in brackets 95 % "
        "intervals of a paired bootstrap over systems. The verdict asks whether the model is "
        "better than its baseline."
    ]
    if any(min(gap.seeds) < 2 for gap in gaps):
        notes.append(
            "One seed: intervals and verdicts hold for these trained models; they do not say what "
            "another seed would give."
        )
    else:
        notes.append(
            "The verdict asks the intervals of the difference itself, over systems and over seeds "
            "(Student's t)."
        )
    for reason in dict.fromkeys(gap.undefined for gap in gaps if gap.undefined):
        where = sorted({_TARGET[gap.target] for gap in gaps if gap.undefined == reason})
        notes.append(f"Undefined ({', '.join(where)}): {reason}.")
    return notes


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything in the tables and more, of plain values; energies in eV, forces in eV/Å."""
    return plain(
        {
            "format": FORMAT,
            "units": {"energy": "eV", "forces": "eV/Å"},
            "free_atoms": comparison.free_atoms,
            "within": WITHIN,
            "models": [
                {
                    "label": group.label,
                    "role": group.role,
                    "baseline": comparison.baselines.get(group.label),
                    "parameters": comparison.parameters[group.label],
                    "losses": group.files[0].losses,
                    "labels": group.files[0].labels_from,
                    "steps": group.steps,
                    "throughput": _speed(comparison, group.label),
                    "runs": [
                        {
                            "checkpoint": str(file.path),
                            "seed": file.seed,
                            "training_seconds": seconds,
                            "metrics": {
                                split.name: split.evaluations[group.label][i].metrics
                                for split in comparison.splits
                            },
                        }
                        for i, (file, seconds) in enumerate(
                            zip(group.files, group.training_seconds, strict=True)
                        )
                    ],
                }
                for group in comparison.groups
            ],
            "splits": {
                split.name: {
                    "path": split.path,
                    "structures": split.systems,
                    "systems": split.trajectories,
                    "gaps": {
                        label: {gap.target: gap.as_dict() for gap in gaps}
                        for label, gaps in split.gaps.items()
                    },
                }
                for split in comparison.splits
            },
        }
    )


def _speed(comparison: Comparison, label: str) -> dict[str, Any] | None:
    speed = comparison.throughputs.get(label)
    return None if speed is None else speed.as_dict()


def arrays(comparison: Comparison) -> dict[str, np.ndarray]:
    """What every seed of every model got on every structure, by split, label, seed and name."""
    found = {
        f"{split.name}/{label}/{number}/{name}": values
        for split in comparison.splits
        for label, evaluations in split.evaluations.items()
        for number, evaluation in enumerate(evaluations)
        for name, values in evaluation.systems.items()
    }
    return {name.replace(" ", "_"): values for name, values in found.items()}


def verdicts(comparison: Comparison) -> list[str]:
    """One plain sentence for every student and split."""
    sentences = []
    for split in comparison.splits:
        for label, gaps in split.gaps.items():
            said = []
            for gap in gaps:
                change = 100 * gap.gain / gap.student if gap.student else 0.0
                words = f"{_TARGET[gap.target]} {gap.verdict}"
                if gap.verdict != NO_EVIDENCE:
                    words += f" (MAE {abs(change):.1f} % {'lower' if change > 0 else 'higher'})"
                said.append(words)
            against = comparison.baselines[label]
            sentences.append(f"{label} against {against} on {split.name}: {', '.join(said)}.")
    return sentences
