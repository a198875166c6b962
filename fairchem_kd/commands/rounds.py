"""``fairchem-kd rounds``: train, explore with the student, train on, until nothing is left."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.calculators.options import add_calculator_arguments, factory_of
from fairchem_kd.commands.arguments import (
    add_cluster_arguments,
    at_least,
    more_than,
    words_of,
)
from fairchem_kd.commands.explore_options import (
    MODEL_BATCH,
    OF_DYNAMICS,
    OF_LIMITS,
    add_dynamics_arguments,
    add_limit_arguments,
    check_dynamics,
    settings_of,
)
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.explore.potentials import Potential
    from fairchem_kd.explore.starts import Source
    from fairchem_kd.explore.storing import Noting

EPILOG = """\
Student 0 is trained with CONFIG.yml as it is, or given by --student. Each round runs the student's
dynamics from given structures, keeps frames where its forces and its teacher's differ (see
`fairchem-kd explore --mode student`), adds them to task.distillation.unlabelled, and trains on from
that student. Rounds end when the dynamics find nothing within the window, or with --rounds or
--budget. With --final one training from student 0 on all that they found, as long as theirs
together, makes the student to use: short trainings one after the other gain less. The last row of
the table is a student with as many structures from rattling alone, trained likewise.

  fairchem-kd rounds my_kd.yml --rounds 3 --out runs/rounds

It can be stopped at any moment, and goes on where it was when the same command is given again. With
--submit it is a job of SLURM's, which does that by itself when it is out of time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd rounds``."""
    parser.description = "Train a student, explore with it, and train on with what was found."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, metavar="CONFIG.yml", help="of a distillation")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of everything")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="(3)")
    parser.add_argument(
        "--frames", type=at_least(1), default=500, metavar="N",
        help="structures that a round may add (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=at_least(1), metavar="N", help="structures that all rounds may add"
    )
    parser.add_argument(
        "--epochs", type=at_least(1), metavar="N",
        help="of the trainings after the first (as many as the config says)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=more_than(0.0), metavar="RATE",
        help="learning rate of the trainings after the first (the config's optim.lr_initial)",
    )  # fmt: skip
    parser.add_argument(
        "--student", type=Path, metavar="RUN",
        help="begin with this student, a run or a checkpoint, and train none before",
    )  # fmt: skip
    parser.add_argument(
        "--source", nargs="+", type=Path, metavar="SOURCE",
        help="structures that dynamics begin with (task.distillation.unlabelled.dataset, or "
        "dataset.train)",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="+", metavar="NAME", help="of SOURCE with several (train)"
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="so many structures of a source at most"
    )
    parser.add_argument(
        "--no-control", action="store_true", help="train no student with rattled structures"
    )
    parser.add_argument(
        "--final", action="store_true",
        help="after several rounds train once more, from student 0, on all that was found, as long "
        "as their trainings together",
    )  # fmt: skip
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(0)")
    add_dynamics_arguments(parser.add_argument_group("the student's dynamics"))
    add_limit_arguments(parser)
    teacher = parser.add_argument_group("a teacher that is no checkpoint, but has a store")
    add_calculator_arguments(teacher, required=False)
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N",
        help=f"structures that are worked on together ({MODEL_BATCH})",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    add_cluster_arguments(parser, "do all of it in one job, which goes on by itself", array=False)


def run(args: argparse.Namespace) -> int:
    """Do the rounds, and print the table after each.

    Raises:
        UserError: a config, a teacher or structures that will not do.
    """
    import logging

    from fairchem_kd.analysis.subjects.runs import find_checkpoint
    from fairchem_kd.data.build import ensure_built
    from fairchem_kd.explore.potentials import told_of
    from fairchem_kd.explore.rounds.running import Rounds, check_same, run_rounds
    from fairchem_kd.explore.rounds.trainings import claimed

    factory_of(args)  # refuses what goes with a calculator alone
    check_dynamics(args, "student")
    logging.getLogger().setLevel(logging.WARNING)
    config = _config(args.config)
    if args.submit:
        return _submit(args, config)
    ensure_built(config)
    sources = _sources(args, config)
    teacher, told, noting = _teacher(args, config)
    settings = settings_of(args, "student")
    options = {
        "config": config,
        "sources": [str(source.path) for source in sources],
        "teacher": told,
        "student": None if args.student is None else told_of(args.student),
        "settings": settings.as_dict(),
        **{
            name: getattr(args, name)
            for name in ("rounds", "budget", "epochs", "lr", "limit", "seed")
        },
    }
    with claimed(args.out) as lock:
        check_same(args.out, {k: v for k, v in options.items() if k != "rounds"})
        plan = Rounds(
            config,
            args.out,
            sources,
            _apart_from(args, config),
            settings,
            teacher,
            told,
            args.rounds,
            limit=args.limit,
            budget=args.budget,
            epochs=args.epochs,
            rate=args.lr,
            control=not args.no_control,
            final=args.final,
            seed=args.seed,
            cpu=args.cpu,
            noting=noting,
            student=None if args.student is None else find_checkpoint(args.student),
            say=lambda words: print(words, flush=True),
        )
        run_rounds(plan, lock)
    return 0


def _submit(args: argparse.Namespace, config: dict[str, Any]) -> int:
    """The same command as a job; 1 where it failed, as far as that is known.

    Raises:
        UserError: the scheduler refuses it.
    """
    from fairchem_kd.commands.jobs import Request, asked_of
    from fairchem_kd.commands.rounds_job import submit

    words = [
        "rounds",
        str(args.config),
        *words_of(
            args,
            *("out", "rounds", "frames", "budget", "epochs", "lr", "limit", "seed", "batch"),
            *(
                "source",
                "splits",
                *OF_DYNAMICS,
                *OF_LIMITS,
                "calculator",
                "calculator_args",
                "teacher_name",
            ),
            *("student", "no_control", "final", "retry", "cpu"),
        ),
    ]
    request = Request(**asked_of(args))
    return 0 if submit(words, args.out, request, config.get("slurm")) else 1


def _config(path: Path) -> dict[str, Any]:
    """The config with what it includes, of a distillation to which structures can be added.

    Raises:
        UserError: it is none.
    """
    from fairchem_kd.distillation.config import parse_distillation
    from fairchem_kd.explore.rounds.pool import check_pool
    from fairchem_kd.stock.configs import load_config

    if not path.is_file():
        raise UserError(f"The config {path} does not exist.")
    try:
        config, _, conflicts = load_config(path)
    except (OSError, ValueError) as error:
        raise UserError(f"The config {path} cannot be read: {error}.") from error
    if conflicts:
        raise UserError(f"The config {path} has includes that contradict each other: {conflicts}.")
    config.pop("includes", None)
    task = config.get("task")
    block = task.get("distillation") if isinstance(task, dict) else None
    if not isinstance(block, dict):
        raise UserError(f"{path} has no task.distillation, so that there is no teacher to ask.")
    parse_distillation(task)
    check_pool((block.get("unlabelled") or {}).get("dataset") or {})
    return config


def _sources(args: argparse.Namespace, config: dict[str, Any]) -> list[Source]:
    """The structures that dynamics begin with.

    Raises:
        UserError: there are none, or some are for validation or tests.
    """
    from fairchem_kd.explore.starts import TRAIN, find_sources, is_held_out

    sources = find_sources(_named_sources(args, config), args.splits)
    judging = {source.path.resolve() for source in _apart_from(args, config)}
    for source in sources:
        if is_held_out(source) or source.path.resolve() in judging:
            raise UserError(
                f"{source.path} is for validation or tests, and rounds train on what comes of "
                "their structures: name others with --source and --splits."
            )
    if len({source.split for source in sources}) > 1:  # what a round may add is of all of them
        sources = [replace(source, split=TRAIN) for source in sources]
    return sources


def _named_sources(args: argparse.Namespace, config: dict[str, Any]) -> list[Path]:
    """Where these structures are.

    Raises:
        UserError: the config has none in a folder of LMDBs.
    """
    if args.source is not None:
        return list(args.source)
    unlabelled = config["task"]["distillation"].get("unlabelled") or {}
    dataset = unlabelled.get("dataset") or (config.get("dataset") or {}).get("train") or {}
    if dataset.get("format", "lmdb") != "lmdb" or not isinstance(dataset.get("src"), str):
        raise UserError(
            f"{args.config}: dataset.train is no folder of LMDBs; name the structures that "
            "dynamics begin with by --source."
        )
    return [Path(dataset["src"])]


def _apart_from(args: argparse.Namespace, config: dict[str, Any]) -> list[Source]:
    """The splits that students are judged by, as far as they are LMDBs, and those given."""
    from fairchem_kd.explore.starts import Source

    named = list(args.apart_from)
    for key in ("val", "test"):
        split = (config.get("dataset") or {}).get(key) or {}
        source = split.get("src")
        if split.get("format", "lmdb") == "lmdb" and isinstance(source, str):
            named.append(Path(source))
    return [Source(path, path.name) for path in named]


def _teacher(
    args: argparse.Namespace, config: dict[str, Any]
) -> tuple[Potential, dict[str, Any], Noting | None]:
    """Who is asked on the way, what it is known by, and what fills the store of one without file.

    Raises:
        UserError: the config's teacher cannot be asked, or there are two.
    """
    from fairchem_kd.distillation.config import named_in
    from fairchem_kd.explore.potentials import CalculatorPotential, ModelPotential, told_of

    teacher = config["task"]["distillation"].get("teacher") or {}
    checkpoint, store = teacher.get("checkpoint"), teacher.get("store")
    if args.calculator is None:
        if checkpoint is None:
            raise UserError(
                f"{args.config}: task.distillation.teacher names a store and no checkpoint, so "
                "that there is nobody to ask on the way: give --calculator MODULE:FACTORY."
            )
        if (several := named_in(checkpoint)) is not None:
            if len(several) != 1:
                raise UserError(
                    f"{args.config}: task.distillation.teacher.checkpoint names {len(several)} "
                    "teachers, and on the way one is asked: name one of them."
                )
            [checkpoint] = several
        path = Path(checkpoint)
        told = {"teacher": told_of(path)}
        trust = teacher.get("trust_checkpoint") is True
        return ModelPotential(path, cpu=args.cpu, trust=trust), told, None
    if checkpoint is not None or store is None or named_in(store) is not None:
        raise UserError(
            f"{args.config}: with --calculator task.distillation.teacher must be {{store: FOLDER}} "
            "without a checkpoint, which would be another teacher."
        )
    from fairchem_kd.calculators.asking import Calculator
    from fairchem_kd.explore.storing import Noting

    factory = factory_of(args)
    assert factory is not None
    calculator = Calculator(factory)
    told = {"teacher": [factory.name, factory.digest]}
    return CalculatorPotential(calculator), told, Noting(calculator, Path(store), retry=args.retry)
