"""The `fairchem` command: stock's, and what this package adds to it.

    argv -> args, config -> data that the config can build -> stock `_cli.main` -> ranks

Stock's `main` does the launching: in this process, in several (elastic launch), or on SLURM. What
each rank runs is `KDRunner`, which makes the rank ready and is stock's `Runner` otherwise.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.common.flags import flags
from fairchem.core.common.utils import build_config, setup_logging
from submitit import AutoExecutor
from submitit.helpers import DelayedSubmission
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fairchem_kd import workarounds
from fairchem_kd.cli import report
from fairchem_kd.config import parse_distillation, refuse_graph_parallel
from fairchem_kd.data.build import ensure_built
from fairchem_kd.denormals import flush_denormals
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.legacy import refuse_renamed_keys
from fairchem_kd.plugin import register
from fairchem_kd.submission import Executor, refusals_told

#: Set in launched ranks: the file to which the first one to meet a UserError writes its sentence.
_SENTENCE = "FAIRCHEM_KD_USER_ERROR_FILE"
_YAML_LITERALS = {"null": "None", "true": "True", "false": "False"}


class KDRunner(_cli.Runner):
    """Stock's `Runner`, in a process that has been made ready for it."""

    def __call__(self, config: dict[str, Any]) -> None:
        """Train, validate, predict or relax, as the config says."""
        if config.get("flush_denormal"):
            # Before the first parallel region; data-loader workers inherit it through fork.
            flush_denormals()
        register()
        if config.get("submit"):
            # Built by the job, not on the login node; ranks and jobs wait for each other.
            ensure_built(config)
            config = workarounds.join_submitted_ranks(config)
        super().__call__(config)

    def checkpoint(self, config: dict[str, Any]) -> DelayedSubmission:
        """What submitit is to run when the job starts again: this run, from where it has come."""
        trainer = getattr(self, "trainer", None)
        if trainer is None:  # it was still being set up
            return DelayedSubmission(KDRunner(), config)
        if not hasattr(trainer, "interruption"):
            config = super().checkpoint(config).args[0]  # a stock trainer: saved here and now
            return DelayedSubmission(KDRunner(), {**config, "submit": True})
        # Ours has saved, where that made sense; its own checkpoint goes before --checkpoint.
        if trainer.logger is not None:
            trainer.logger.mark_preempting()
        return DelayedSubmission(KDRunner(), {**config, "timestamp_id": trainer.timestamp_id})


def run_rank(config: dict[str, Any]) -> None:
    """Run the only rank, in this process."""
    workarounds.own_port()
    KDRunner()(config)


def run_launched_rank(config: dict[str, Any]) -> None:
    """Run one of several ranks; what the user can mend goes to the launching process."""
    try:
        KDRunner()(config)
    except UserError as error:
        path = Path(os.environ[_SENTENCE])
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(str(error))
        part.replace(path)
        sys.exit(2)


@contextmanager
def _sentence_of_ranks() -> Iterator[None]:
    """Raise a launched rank's UserError here, in place of all that elastic launch has to say."""
    with tempfile.TemporaryDirectory(prefix="fairchem_kd_") as folder:
        sentence = Path(folder) / "sentence"
        os.environ[_SENTENCE] = str(sentence)
        # They report exit codes and where an exception came from; by then the rank has spoken.
        loggers = [
            logging.getLogger(f"torch.distributed.elastic.{name}")
            for name in ("multiprocessing.api", "agent.server.api")
        ]

        def unspoken(record: logging.LogRecord) -> bool:
            return not sentence.exists()

        for logger in loggers:
            logger.addFilter(unspoken)
        try:
            yield
        except ChildFailedError:
            if sentence.exists():
                raise UserError(sentence.read_text()) from None
            raise
        finally:
            del os.environ[_SENTENCE]
            for logger in loggers:
                logger.removeFilter(unspoken)


def make_parser() -> argparse.ArgumentParser:
    """Return stock's parser with our flag."""
    parser = copy.deepcopy(flags.get_parser())
    parser.prog = "fairchem"
    parser.add_argument(
        "--flush-denormal",
        action="store_true",
        help="flush denormal numbers to zero on a CPU: on some processors several times faster for "
        "PaiNN (a DistillationTrainer does so without this flag)",
    )
    return parser


def read_config(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return the config with its includes and the command line's overrides.

    Raises:
        UserError: the file or one that it includes is missing, not YAML, or conflicting.
    """
    path: Path = args.config_yml
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise UserError(
            f"the config {path}, given with --config-yml, does not exist in {Path.cwd()}"
            f"{did_you_mean(path.name, names)}; "
            "`fairchem-kd configs --copy .` writes the shipped ones."
        )
    for word in overrides:
        if not word.startswith("--") or "=" not in word:
            raise UserError(
                f"the argument {word!r} is no flag of fairchem and no override of a config key; "
                "overrides are written as --optim.max_epochs=3."
            )
    try:
        config = build_config(args, [_as_literal(word) for word in overrides])
    except (ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the config {path} cannot be used: {error}") from error
    try:
        refuse_renamed_keys(config, f"the config {path}")
    except UserError as error:
        if _is_ours(config):
            raise
        logging.warning(f"{error} It is not read.")  # as stock, which has defaults in its place
    missing = [key for key in ("model", "dataset", "optim") if key not in config]
    if missing:
        raise UserError(f"the config {path} has no {' and no '.join(missing)} block.")
    return config


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether the trainer that it names is ours."""
    return str(config.get("trainer")).rpartition(".")[2] in ("distillation", "DistillationTrainer")


def _as_literal(override: str) -> str:
    """YAML's null, true and false as Python's, since stock takes them for text."""
    key, _, value = override.partition("=")
    return f"{key}={_YAML_LITERALS.get(value, value)}"


def run_config(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Build the data that is missing, then launch the config as stock would."""
    parse_distillation(config.get("task"))  # before minutes are spent on data
    if _is_ours(config):
        refuse_graph_parallel(args.gp_gpus)
    if not args.submit:
        ensure_built(config)
    rank = run_rank if args.num_gpus == 1 else run_launched_rank
    executor = functools.partial(Executor, cpu=args.cpu)
    with (
        workarounds.stock_command_with(
            config=config, runner=KDRunner, rank=rank, executor=executor
        ),
        _sentence_of_ranks(),
        refusals_told(args.num_nodes) if args.submit else nullcontext(),
    ):
        _cli.main(args, [])


def _run_and_report(args: argparse.Namespace, config: dict[str, Any]) -> int:
    if args.flush_denormal:
        flush_denormals()
    try:
        run_config(args, config)
    except UserError as error:
        distutils.cleanup()
        return report(error)
    return 0


def _run_of_sweep(args: argparse.Namespace, config: dict[str, Any]) -> None:
    # A spawned process spawns in turn; data-loader workers are forked, as in a run of its own.
    multiprocessing.set_start_method(None, force=True)
    setup_logging()
    sys.exit(_run_and_report(args, config))


def run_sweep(args: argparse.Namespace, config: dict[str, Any]) -> int:
    """Run the configs of a grid one after the other, each in a fresh process.

    A run that fails does not stop the others; the exit code is that of the first that failed.
    """
    grid = workarounds.sweep_grid(config, args.sweep_yml)
    args = argparse.Namespace(**{**vars(args), "sweep_yml": None})
    failed = []
    for number, one in enumerate(grid):
        logging.info(f"Sweep: run {number + 1} of {len(grid)}, identifier {one['identifier']}")
        process = multiprocessing.get_context("spawn").Process(
            target=_run_of_sweep, args=(args, one)
        )
        process.start()
        process.join()
        if process.exitcode:
            failed.append((one["identifier"], process.exitcode))
    if failed:
        logging.error(f"Sweep: {len(failed)} of {len(grid)} runs failed: {failed}")
        return abs(failed[0][1])
    logging.info(f"Sweep: all {len(grid)} runs done")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairchem` command; an optional leading ``main`` is accepted.

    Returns 0, or 2 with a sentence on stderr for what the user can mend; other errors are raised,
    as stock does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["main"]:
        argv = argv[1:]
    args, overrides = make_parser().parse_known_args(argv)
    setup_logging()
    elsewhere = args.submit and AutoExecutor.which() != "local"
    if not (args.cpu or elsewhere or torch.cuda.is_available()):
        logging.info("No CUDA device here: running on the CPU, as with --cpu")
        args.cpu = True
    try:
        config = read_config(args, overrides)
        if args.flush_denormal:
            config["flush_denormal"] = True
        if args.sweep_yml and not args.submit:
            return run_sweep(args, config)
    except UserError as error:
        return report(error)
    return _run_and_report(args, config)
