"""The regime in words: who saw which labels. Everything here comes from configs and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairchem_kd.analysis.subjects.runs import ModelFile
from fairchem_kd.analysis.subjects.splits import count_structures
from fairchem_kd.demo.plan import Training
from fairchem_kd.distillation.config import parse_distillation


def regime(
    trainings: Sequence[Training],
    teacher: ModelFile,
    parameters: Mapping[str, int],
    jobs: int,
    labelling: float,
) -> list[str]:
    """Sentences on teacher and students, one for each kind of training.

    Args:
        trainings: of all students; those of the first seed speak for all.
        teacher: its checkpoint.
        parameters: by label, with the teacher's under ``teacher``.
        jobs: how many trainings ran at a time.
        labelling: seconds that the teacher took for all its answers.
    """
    first = [training for training in trainings if training.seed == trainings[0].seed]
    config = first[0].config
    metric = config.get("evaluation_metrics", {}).get("primary_metric")
    train, val = config["dataset"]["train"], config["dataset"].get("val")
    seeds = sorted({training.seed for training in trainings})
    taught = teacher.config.get("dataset") or {}
    lines = [
        f"Teacher: {_name(teacher.config['model'])}, {_million(parameters['teacher'])}, trained on "
        f"the labels of {_structures(taught)}.",
        f"Students: {_name(config['model'])}, {_million(parameters[first[0].label])}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, all with the labels of "
        f"{_structures(train)}; {jobs} training"
        f"{'s' * (jobs > 1)} at a time, one thread each.",
    ]
    if val:
        lines.append(
            f"Of each student, the checkpoint with the best {metric} on {_structures(val)} counts."
        )
    lines.append(
        f"The teacher was asked once, which took {labelling:.0f} s; what it said was kept, for all "
        "the trainings."
    )
    for training in first:
        per_step = _structures_of_a_step(training.config)
        lines.append(
            f"- {training.label}: {training.steps} steps of {per_step} structures"
            f"{_taught(training.config)}."
        )
    return lines


def _taught(config: Mapping[str, Any]) -> str:
    """What a student has from its teacher."""
    distillation = parse_distillation(config.get("task"))
    terms = distillation.active_terms
    if not terms:
        return ", no teacher"
    words = [f"{name} (coefficient {term.coefficient:g})" for name, term in terms.items()]
    text = f"; the teacher's {', '.join(words)}"
    rattle, unlabelled = distillation.rattle, distillation.unlabelled
    if rattle is not None and rattle.copies > 0:
        text += (
            f"; {rattle.copies:g} rattled copies per structure, displaced by {rattle.std:g} Å, "
            "for which the teacher alone speaks"
        )
    if unlabelled is not None:
        text += (
            f"; {_structures(unlabelled.dataset, unlabelled.skip)}, of which the student sees no "
            f"labels, as {100 * unlabelled.share:.0f} % of the structures of a step"
        )
    return text


def _structures_of_a_step(config: Mapping[str, Any]) -> int:
    """Labelled and unlabelled ones; displaced copies come on top."""
    distillation, labelled = parse_distillation(config.get("task")), config["optim"]["batch_size"]
    if not distillation.active_terms or distillation.unlabelled is None:
        return labelled
    return labelled + distillation.unlabelled.per_step(labelled)


def _name(model: Mapping[str, Any]) -> str:
    return str((model.get("backbone") or {}).get("model") or model["name"])


def _million(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M parameters"


def _structures(dataset: Mapping[str, Any], skipped: int = 0) -> str:
    """``3000 structures (data/slabs/train)``; the number as far as data or config tell it."""
    source = str(dataset.get("src", "unknown data"))
    if not Path(source).exists():
        build = dataset.get("build") or {}
        planned = build.get(Path(source).name) if not skipped else None
        return f"{planned} structures ({source})" if planned else f"structures ({source})"
    count = count_structures(dataset) - skipped
    return f"{count} structures ({source}{f' without its first {skipped}' if skipped else ''})"
