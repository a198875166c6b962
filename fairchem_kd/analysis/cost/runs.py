"""What finished runs cost, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fairchem_kd.analysis.cost import tables as shown
from fairchem_kd.analysis.cost.inference import measure_inference, measure_md
from fairchem_kd.analysis.cost.plots import figures
from fairchem_kd.analysis.cost.study import Costs
from fairchem_kd.analysis.cost.timing import circumstances
from fairchem_kd.analysis.cost.training import measure_training
from fairchem_kd.analysis.subjects.calculators import atoms_of, make_calculator
from fairchem_kd.analysis.subjects.runs import ModelFile, load_model, read_model
from fairchem_kd.analysis.subjects.structures import data_of, open_structures
from fairchem_kd.errors import UserError
from fairchem_kd.machine import choose_device
from fairchem_kd.report.study import Study
from fairchem_kd.stock.datasets import collate


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often.

    Attributes:
        batch_sizes: of inference.
        repeats: timed turns.
        warm_up: turns before.
        train_batch_size: in training; the run's own where it is None.
        inference: measure it.
        md: and steps of molecular dynamics.
        training: measure that.
    """

    batch_sizes: Sequence[int] = (1, 8, 32)
    repeats: int = 7
    warm_up: int = 2
    train_batch_size: int | None = None
    inference: bool = True
    md: bool = True
    training: bool = True


def study(
    paths: Sequence[Path],
    *,
    teacher: Path | None = None,
    data: str | None = None,
    settings: Settings | None = None,
    cpu: bool = False,
    trust: bool = False,
) -> Study:
    """Measure inference of every architecture among the runs, and training of those distilled.

    Args:
        paths: folders of runs, or checkpoints.
        teacher: likewise; the runs' own where none is given.
        data: structures for inference; the runs' test set where none are given.
        settings: what is measured.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle files that may run code.

    Raises:
        UserError: models or data that cannot be measured.
    """
    settings = settings or Settings()
    runs = [read_model(path, trust=trust) for path in paths]
    labelled = dict(zip(_labels(runs), runs, strict=True))
    device = choose_device(cpu=cpu)
    costs = Costs({"kind": device.type, **circumstances(device)}, "", {})
    if settings.inference:
        named = teacher or next((file.teacher for file in runs if file.teacher), None)
        own = None if named is None else read_model(named, trust=trust)
        source = data or data_of(runs[0])
        _inference(costs, _architectures(own, labelled), source, settings, device)
    if settings.training:
        for label, file in labelled.items():
            if file.losses:
                costs.training[label] = measure_training(
                    file,
                    cpu=device.type == "cpu",
                    batch_size=settings.train_batch_size,
                    repeats=settings.repeats,
                    warm_up=settings.warm_up,
                    progress=True,
                )
    if not costs.inference and not costs.training:
        raise UserError("There is nothing to measure: no run was distilled; leave --no-inference.")
    return Study(
        "cost",
        tables=partial(shown.tables, costs),
        figures=partial(figures, costs),
        as_dict=partial(shown.as_dict, costs),
    )


def _architectures(
    teacher: ModelFile | None, runs: Mapping[str, ModelFile]
) -> dict[str, ModelFile]:
    """The teacher, and one run of every architecture: those of one architecture cost the same."""
    files = {} if teacher is None else {"teacher": teacher}
    students: dict[str, ModelFile] = {}
    for label, file in runs.items():
        known = [*files.values(), *students.values()]
        if not any(file.config["model"] == other.config["model"] for other in known):
            students[label if label != "teacher" else "teacher's run"] = file
    if files and len(students) == 1:
        students = {"student": next(iter(students.values()))}
    return files | students


def _inference(
    costs: Costs,
    files: Mapping[str, ModelFile],
    source: str | Mapping[str, object],
    settings: Settings,
    device: torch.device,
) -> None:
    """Fill in throughput, memory and MD of every file."""
    models = {label: load_model(file, device) for label, file in files.items()}
    costs.parameters = {
        label: sum(p.numel() for p in model.model.parameters()) for label, model in models.items()
    }
    with open_structures(source, limit=max(settings.batch_sizes)) as structures:
        costs.data = structures.path
        samples = list(structures.samples())
        first = atoms_of(structures)[0] if settings.md else None
    fitting = sorted({min(size, len(samples)) for size in settings.batch_sizes})
    batches = [collate(samples[:size]) for size in fitting]
    costs.inference = measure_inference(
        models, batches, repeats=settings.repeats, warm_up=settings.warm_up, progress=True
    )
    if first is not None:
        on_cpu = device.type == "cpu"
        calculators = {label: make_calculator(file, cpu=on_cpu) for label, file in files.items()}
        costs.md = measure_md(calculators, first, steps=settings.repeats, warm_up=settings.warm_up)
        costs.md_atoms = len(first)


def _labels(files: Sequence[ModelFile]) -> list[str]:
    """What each run is called, made different by numbers where it has to be."""
    names = [file.identifier for file in files]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
        for number, name in enumerate(names)
    ]
