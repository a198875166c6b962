"""The `fairchem` command: stock's, and what this package adds to it.

    argv -> args, config -> data that the config can build -> stock `_cli.main` -> ranks

Stock's `main` does the launching: in this process, in several (elastic launch), or on SLURM. What
each rank runs is `KDRunner`, which makes the rank ready and is stock's `Runner` otherwise.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.common.utils import setup_logging
from submitit import AutoExecutor

from fairchem_kd.data.build import ensure_built
from fairchem_kd.distillation.config import parse_distillation, refuse_graph_parallel
from fairchem_kd.distillation.opening import refuse_missing_teacher
from fairchem_kd.errors import UserError, report
from fairchem_kd.launch.config import check_placed, is_ours, make_parser, read_config
from fairchem_kd.launch.ranks import KDRunner, run_launched_rank, run_rank, sentence_of_ranks
from fairchem_kd.launch.stock_command import stock_command_with
from fairchem_kd.launch.submission import Executor, refusals_told
from fairchem_kd.machine import flush_denormals
from fairchem_kd.stock.conservative import check_conservative
from fairchem_kd.stock.noise import VERBOSE, plain_logs
from fairchem_kd.stock.options import check_training_config
from fairchem_kd.stock.predictions import in_single_precision
from fairchem_kd.stock.relaxation import take_optimizer_name
from fairchem_kd.stock.softness import check_softness
from fairchem_kd.teachers.place import writable

#: Makes the configs of a sweep out of a base config and the sweep's file.
Grid = Callable[[dict[str, Any], Path], list[dict[str, Any]]]


def run_config(args: argparse.Namespace, config: dict[str, Any], grid: Grid | None = None) -> None:
    """Build the data that is missing, then launch the config as stock would."""
    distillation = parse_distillation(config.get("task"))  # before minutes are spent on data
    check_placed(config)
    if why := writable(Path(args.run_dir)):
        raise UserError(
            f"--run-dir {args.run_dir} cannot be written ({why}), and runs make their folders in "
            "it: name another folder."
        )
    check_conservative(config, ours=is_ours(config))
    check_softness(config, ours=is_ours(config))
    if is_ours(config):
        check_training_config(config)
        refuse_graph_parallel(args.gp_gpus)
    if not args.submit:
        if is_ours(config) and args.mode == "train":
            refuse_missing_teacher(distillation)  # data may take minutes, too
        ensure_built(config)
    rank = run_rank if args.num_gpus == 1 else run_launched_rank
    executor = functools.partial(Executor, cpu=args.cpu)
    with (
        stock_command_with(config=config, grid=grid, runner=KDRunner, rank=rank, executor=executor),
        sentence_of_ranks(),
        refusals_told(args.num_nodes) if args.submit else nullcontext(),
    ):
        _cli.main(args, [])


def _run_and_report(
    args: argparse.Namespace, config: dict[str, Any], grid: Grid | None = None
) -> int:
    if args.flush_denormal:
        flush_denormals()
    try:
        run_config(args, config, grid)
    except UserError as error:
        distutils.cleanup()
        return report(error)
    return 0


def _run_of_sweep(args: argparse.Namespace, config: dict[str, Any]) -> None:
    # A spawned process spawns in turn; data-loader workers are forked, as in a run of its own.
    multiprocessing.set_start_method(None, force=True)
    setup_logging()
    plain_logs()
    sys.exit(_run_and_report(args, config))


def run_sweep(args: argparse.Namespace, config: dict[str, Any], grid: Grid) -> int:
    """Run the configs of a grid one after the other, each in a fresh process.

    A run that fails does not stop the others; the exit code is that of the first that failed.
    """
    configs = grid(config, args.sweep_yml)
    args = argparse.Namespace(**{**vars(args), "sweep_yml": None})
    failed = []
    for number, one in enumerate(configs):
        logging.info(f"Sweep: run {number + 1} of {len(configs)}, identifier {one['identifier']}")
        process = multiprocessing.get_context("spawn").Process(
            target=_run_of_sweep, args=(args, one)
        )
        process.start()
        process.join()
        if process.exitcode:
            failed.append((one["identifier"], process.exitcode))
    if failed:
        logging.error(f"Sweep: {len(failed)} of {len(configs)} runs failed: {failed}")
        return abs(failed[0][1])
    logging.info(f"Sweep: all {len(configs)} runs done")
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what stock takes and fails with.

    Raises:
        UserError: a number out of range, no mode, or no checkpoint where one is needed.
    """
    for flag, least in (("num_gpus", 1), ("num_nodes", 1), ("print_every", 1), ("seed", 0)):
        value = getattr(args, flag, None)
        if isinstance(value, int) and value < least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    if not args.mode:
        raise UserError("--mode is required: train, validate, predict or run-relaxations.")
    if args.mode in ("predict", "validate") and not args.checkpoint:
        raise UserError(f"--mode {args.mode} needs --checkpoint, the weights to do it with.")


def main(argv: Sequence[str] | None = None, grid: Grid | None = None) -> int:
    """Run the `fairchem` command; an optional leading ``main`` is accepted.

    Args:
        grid: makes the configs of ``--sweep-yml``, which is refused without it.

    Returns 0, or 2 with a sentence on stderr for what the user can mend; other errors are raised,
    as stock does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["main"]:
        argv = argv[1:]
    args, overrides = make_parser().parse_known_args(argv)
    if args.verbose:
        os.environ[VERBOSE] = "1"  # for ranks in other processes, and in jobs
    setup_logging()
    plain_logs()
    elsewhere = args.submit and AutoExecutor.which() != "local"
    if not (args.cpu or elsewhere or torch.cuda.is_available()):
        logging.info("No CUDA device here: running on the CPU, as with --cpu")
        args.cpu = True
    try:
        _check_flags(args)
        config = read_config(args, overrides)
        if in_single_precision(config) and args.mode == "predict":
            logging.info(
                "Predictions are written as float32; task.prediction_dtype: float16 gives stock's "
                "half precision."
            )
        if args.mode == "run-relaxations":
            take_optimizer_name(config)
        if args.flush_denormal:
            config["flush_denormal"] = True
        if args.sweep_yml and grid is None:
            raise UserError("--sweep-yml: a run of a sweep has no sweep of its own; leave it out.")
        if args.sweep_yml and grid is not None and not args.submit:
            return run_sweep(args, config, grid)
    except UserError as error:
        return report(error)
    return _run_and_report(args, config, grid)
