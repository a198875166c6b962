"""What is worked around in fairchem-core 1.10, one function each, with the reason."""

from __future__ import annotations

import copy
import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.common.utils import dict_set_recursively, parse_value
from fairchem.core.trainers import base_trainer

from fairchem_kd.checkpoint import write_checkpoint
from fairchem_kd.errors import UserError


def fresh_timestamp(
    run_dir: str, device: torch.device, suffix: str | None, *, claim: bool = True
) -> str:
    """A name for a new run that no other run has, the same on every rank.

    Stock's ``_get_timestamp`` sends the time through a float32 tensor: a granularity of 128 s, so
    that two runs with the same identifier share a folder and the second silently resumes the first.
    Here the first rank claims the folder by creating it (a debugging run makes no folders, and
    claims none), and tells its name to the others.
    """
    name = [""]
    if distutils.is_master():
        now = datetime.datetime.now()
        while True:
            name[0] = now.strftime("%Y-%m-%d-%H-%M-%S") + (f"-{suffix}" if suffix else "")
            if not claim:
                break
            try:
                os.makedirs(os.path.join(run_dir, "checkpoints", name[0]))
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    distutils.broadcast_object_list(name, src=0, device=device)
    return name[0]


@contextmanager
def checkpoints_written_with(extra: dict[str, Any]) -> Iterator[None]:
    """Within the block, stock's ``save`` writes ``extra`` into the file too, and writes it safely.

    ``BaseTrainer.save`` builds its dictionary and writes it in place: there is no hook for another
    key, and a crash while it writes leaves a truncated file. Its only way out is the function
    ``save_checkpoint`` of its module, which is replaced for the time of the call.
    """

    def save_checkpoint(
        state: dict[str, Any], checkpoint_dir: str = "checkpoints/", checkpoint_file: str = ""
    ) -> str:
        path = os.path.join(checkpoint_dir, checkpoint_file)
        write_checkpoint({**state, **extra}, path)
        return path

    original = base_trainer.save_checkpoint
    base_trainer.save_checkpoint = save_checkpoint
    try:
        yield
    finally:
        base_trainer.save_checkpoint = original


def sweep_grid(base: dict[str, Any], sweep_yml: Path) -> list[dict[str, Any]]:
    """Every combination of a sweep file's values, each in a copy of the config ``base``.

    Stock's ``create_grid`` needs ``collections.MutableMapping``, gone since Python 3.10. This one
    reads the same files: nested keys (or dotted ones) whose leaves are lists of values. Values are
    read as those of the command line are, so ``1e-4``, a string in YAML, is a number here.

    Raises:
        UserError: the file is missing, is not a mapping, or has a leaf that is not a list.
    """

    def leaves(node: Any, key: str) -> Iterator[tuple[str, list[Any]]]:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                yield from leaves(child, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list) and node:
            yield key, node
        else:
            raise UserError(
                f"{sweep_yml}: {key or 'the file'} must hold a list of values to try, "
                "or keys that do."
            )

    try:
        sweep = yaml.safe_load(Path(sweep_yml).read_text())
    except FileNotFoundError:
        raise UserError(f"the file {sweep_yml}, given with --sweep-yml, does not exist.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{sweep_yml} is not valid YAML: {error}") from error
    axes = list(leaves(sweep, ""))
    grid = []
    for number, values in enumerate(itertools.product(*(values for _, values in axes))):
        config = copy.deepcopy(base)
        for (key, _), value in zip(axes, values, strict=True):
            value = parse_value(value) if isinstance(value, str) else copy.deepcopy(value)
            dict_set_recursively(config, key.split("."), value)
        config["identifier"] = f"{base.get('identifier') or ''}_run{number}"
        grid.append(config)
    return grid


@contextmanager
def stock_command_with(
    *, config: dict[str, Any], runner: type, rank: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Within the block, stock's ``_cli.main`` takes this config, this Runner, this rank function.

    It builds its config inside and launches functions of its own module: there is no hook for data
    to be built first, for a plugin in launched processes, or for an error without a traceback. Both
    replacements must be importable, since launched processes and SLURM jobs unpickle them.
    """
    replacements = {
        "build_config": lambda args, overrides: config,
        "create_grid": sweep_grid,
        "Runner": runner,
        "runner_wrapper": rank,
    }
    originals = {name: getattr(_cli, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(_cli, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(_cli, name, original)
