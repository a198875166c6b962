"""``fairchem-kd demo``: train the same student plainly and with its teacher, and compare."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.errors import UserError
from fairchem_kd.machine import available_cores

if TYPE_CHECKING:
    from fairchem_kd.demo.children import Finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd demo``."""
    parser.description = (
        "Ask the teacher once about every structure; then train a student plainly, with e2n, with "
        "the teacher's outputs, with all of it, with all of it for longer, and plainly for as "
        "long as that took; then compare them with their teacher. Started again after an "
        "interruption, it keeps what finished."
    )
    parser.add_argument(
        "--configs", type=Path, default=Path("yaml_configs/demo"), metavar="DIR",
        help="the folder of the students' configs (yaml_configs/demo)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR",
        help="the folder for runs, table, results and plots (runs/demo)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[0], help="one run for each (0)"
    )
    parser.add_argument(
        "--steps", type=at_least(1), help="of each student, in place of the configs'"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), help="trainings at a time (the number of cores)"
    )
    parser.add_argument(
        "--longer", type=at_least(2), default=4, metavar="N",
        help="times as many steps has the longer training (4)",
    )  # fmt: skip
    parser.add_argument("--no-plots", action="store_true", help="write no plots")


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, compare, print and write; returns the exit code.

    Raises:
        UserError: wrong options or configs, or a training that failed.
    """
    _check(args)
    import torch

    from fairchem_kd.analysis.compare import tables as report
    from fairchem_kd.analysis.compare.comparison import BASELINE, TEACHER, Group, compare
    from fairchem_kd.analysis.compare.runs import as_study
    from fairchem_kd.analysis.subjects.runs import read_model
    from fairchem_kd.analysis.subjects.splits import count_structures, splits_of_run
    from fairchem_kd.demo import children, plan
    from fairchem_kd.demo.regime import regime
    from fairchem_kd.demo.tables import gaps, table
    from fairchem_kd.demo.teaching import teach
    from fairchem_kd.machine import flush_denormals

    configs = plan.read_configs(args.configs)
    teacher = read_model(_teacher(configs))
    dataset = configs[plan.BASELINE]["dataset"]
    structures = count_structures(dataset["train"])
    trainings = plan.plan(configs, args.seeds, structures, args.steps, args.longer)
    cuda = torch.cuda.is_available()
    jobs = args.jobs or (1 if cuda else min(len(trainings), available_cores()))

    def then(done: Finished, so_far: list[Finished]) -> Sequence[plan.Training]:
        """The long plain training of a seed, once both that decide its length are done."""
        ours = {one.training.name: one for one in so_far if one.training.seed == done.training.seed}
        if done.training.name not in (plan.BASELINE, plan.LONGEST):
            return ()
        if not {plan.BASELINE, plan.LONGEST} <= ours.keys():
            return ()
        plain, longest = ours[plan.BASELINE], ours[plan.LONGEST]
        return [plan.longer(plain.training, longest.seconds, plain.seconds, structures)]

    try:
        with children.claimed(args.out) as lock:
            labelling = teach(configs[plan.WHOLE], args.out, lock)
            done = children.train_all(trainings, args.out, jobs=jobs, lock=lock, then=then)
    except children.Interrupted as signal:
        print(
            f"stopped ({signal}); start the same command again to go on: what finished is kept.",
            file=sys.stderr,
        )
        return 130

    if not cuda:
        flush_denormals()
    groups = [Group("teacher", [teacher], TEACHER)]
    for name, label in plan.labels_by_name(args.longer).items():
        ours = sorted((d for d in done if d.training.name == name), key=lambda d: d.training.seed)
        files = [read_model(one.checkpoint) for one in ours]
        seconds: list[float | None] = [one.seconds for one in ours]
        groups.append(Group(label, files, training_seconds=seconds))
        if name == plan.BASELINE:
            groups[-1].role = BASELINE
    run_config = {"dataset": dataset["train"], "test_dataset": dataset.get("test") or {}}
    comparison = compare(
        groups, splits_of_run(run_config), device="cuda" if cuda else "cpu", progress=True
    )
    order = [group.label for group in groups]
    every = sorted((d.training for d in done), key=lambda t: (t.seed, order.index(t.label)))
    head = regime(every, teacher, comparison.parameters, jobs, labelling)
    tables = [table(comparison), gaps(comparison)]
    wrapped = (textwrap.fill(one, 100, subsequent_indent="  ") for one in head)
    print("\n".join(wrapped), end="\n\n")
    print("\n\n".join(one.text() for one in tables), end="\n\n")
    said = report.verdicts(comparison)
    print("\n".join(said))
    study = replace(
        as_study(comparison),
        tables=lambda: tables,
        as_dict=lambda: {**report.as_dict(comparison), "regime": head, "training_jobs": jobs},
        head="\n".join([*head, "", *(f"- {one}" for one in said)]),
    )
    written = study.write(args.out, with_plots=not args.no_plots)
    print(f"\nwrote {', '.join(str(path) for path in written)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be different whole numbers; one of them is given twice.")
    if not args.no_plots:
        from fairchem_kd.report.figures import check_matplotlib

        check_matplotlib()


def _teacher(configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """The one teacher of all the students that have one."""
    from fairchem_kd.distillation.config import parse_distillation

    paths = {}
    for name, config in configs.items():
        distillation = parse_distillation(config.get("task"))
        if distillation.active_terms:
            paths[str(distillation.teacher.checkpoint)] = name
    if len(paths) != 1:
        found = ", ".join(f"{path} in {name}.yml" for path, name in paths.items()) or "none"
        raise UserError(f"The demo's students must have one teacher between them, not: {found}.")
    return Path(next(iter(paths)))
