"""``fairchem-kd cost``: how fast teacher and students are, and what distilling costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.commands.output import add_output_arguments, as_text, check_output, deliver
from fairchem_kd.errors import UserError

EPILOG = """\
A RUN is the folder of a run or a checkpoint. Inference is measured of the teacher (the one that the
runs were distilled from) and of every architecture among the runs; training of the distilled runs,
whose data and teacher have to be there.

  fairchem-kd cost checkpoints/*-e2n --batch-sizes 1,8,32 --out cost
  fairchem-kd cost small.pt --teacher large.pt --data structures.extxyz --no-training
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd cost``."""
    parser.description = (
        "Throughput, memory and time per MD step of teacher and students, side by side; what a "
        "step of training costs with and without distillation, and where the time goes."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--teacher", type=Path, metavar="RUN", help="(default: the runs' own)")
    parser.add_argument(
        "--data", metavar="PATH", help="structures for inference (default: the runs' test set)"
    )
    parser.add_argument("--batch-sizes", default="1,8,32", metavar="N,N", help="(1,8,32)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=7, metavar="N", help="timed turns (7)"
    )
    parser.add_argument(
        "--warm-up", type=at_least(0), default=2, metavar="N", help="turns before (2)"
    )
    parser.add_argument(
        "--train-batch-size",
        type=at_least(1),
        metavar="N",
        help="in training (default: the run's own)",
    )
    parser.add_argument("--no-inference", action="store_true", help="measure training alone")
    parser.add_argument("--no-md", action="store_true", help="no MD steps")
    parser.add_argument("--no-training", action="store_true", help="measure inference alone")
    add_output_arguments(parser, "cost.md, cost.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        UserError: models or data that cannot be measured.
    """
    sizes = _sizes(args.batch_sizes)
    check_output(args)
    from fairchem_kd.analysis.cost import tables as cost
    from fairchem_kd.analysis.cost.timing import circumstances
    from fairchem_kd.analysis.cost.training import measure_training
    from fairchem_kd.analysis.subjects.runs import read_model
    from fairchem_kd.machine import choose_device

    runs = [read_model(path, trust=args.trust) for path in args.runs]
    labels = _labels(runs)
    device = choose_device(cpu=args.cpu)
    costs = cost.Costs({"kind": device.type, **circumstances(device)}, "", {})
    if not args.no_inference:
        _inference(args, costs, dict(zip(labels, runs, strict=True)), sizes, device)
    if not args.no_training:
        for label, file in zip(labels, runs, strict=True):
            if file.losses:
                costs.training[label] = measure_training(
                    file,
                    cpu=device.type == "cpu",
                    batch_size=args.train_batch_size,
                    repeats=args.repeats,
                    warm_up=args.warm_up,
                    progress=True,
                )
    if not costs.inference and not costs.training:
        raise UserError("There is nothing to measure: no run was distilled; leave --no-inference.")
    deliver(
        args,
        text=lambda: as_text(cost.tables(costs)),
        content=lambda: cost.as_dict(costs),
        write=partial(cost.write, costs),
    )
    return 0


def _inference(
    args: argparse.Namespace, costs: Any, runs: dict[str, Any], sizes: Sequence[int], device: Any
) -> None:
    """Fill in throughput, memory and MD of the teacher and of every architecture among the runs."""
    from fairchem_kd.analysis.cost.inference import measure_inference, measure_md
    from fairchem_kd.analysis.subjects.calculators import atoms_of, make_calculator
    from fairchem_kd.analysis.subjects.runs import load_model, read_model
    from fairchem_kd.analysis.subjects.structures import data_of, open_structures
    from fairchem_kd.stock.datasets import collate

    files = {}
    named = args.teacher or next((file.teacher for file in runs.values() if file.teacher), None)
    if named is not None:
        files["teacher"] = read_model(named, trust=args.trust)
    students: dict[str, Any] = {}
    for label, file in runs.items():  # students of one architecture cost the same
        known = [*files.values(), *students.values()]
        if not any(file.config["model"] == other.config["model"] for other in known):
            students[label if label != "teacher" else "teacher's run"] = file
    if files and len(students) == 1:
        students = {"student": next(iter(students.values()))}
    files |= students
    models = {label: load_model(file, device) for label, file in files.items()}
    costs.parameters = {
        label: sum(p.numel() for p in model.model.parameters()) for label, model in models.items()
    }
    source = args.data or data_of(next(iter(runs.values())))
    with open_structures(source, limit=max(sizes)) as structures:
        costs.data = structures.path
        samples = list(structures.samples())
        first = None if args.no_md else atoms_of(structures)[0]
    fitting = sorted({min(size, len(samples)) for size in sizes})
    batches = [collate(samples[:size]) for size in fitting]
    costs.inference = measure_inference(
        models, batches, repeats=args.repeats, warm_up=args.warm_up, progress=True
    )
    if first is not None:
        on_cpu = device.type == "cpu"
        calculators = {label: make_calculator(file, cpu=on_cpu) for label, file in files.items()}
        costs.md = measure_md(calculators, first, steps=args.repeats, warm_up=args.warm_up)
        costs.md_atoms = len(first)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch-sizes '{text}' does not read N,N,...: for example 1,8,32.")
    return sizes


def _labels(files: Sequence[Any]) -> list[str]:
    """What each run is called, made different by numbers where it has to be."""
    names = [file.identifier for file in files]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
        for number, name in enumerate(names)
    ]
