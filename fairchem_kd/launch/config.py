"""The `fairchem` command's arguments, and the config that they name."""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairchem.core.common.flags import flags

from fairchem_kd.distillation.config import OURS
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.models.legacy import refuse_renamed_keys
from fairchem_kd.schema import is_null
from fairchem_kd.stock.configs import check_blocks, read_yaml, usable_config
from fairchem_kd.stock.options import check_overrides
from fairchem_kd.stock.trainer import check_run_names

_YAML_LITERALS = {"null": "None", "true": "True", "false": "False"}


def make_parser() -> argparse.ArgumentParser:
    """Return stock's parser with our flag."""
    parser = copy.deepcopy(flags.get_parser())
    parser.prog = "fairchem"
    parser.set_defaults(run_dir=os.getcwd())  # stock's is where fairchem was imported
    parser.add_argument(
        "--flush-denormal",
        action="store_true",
        help="flush denormal numbers to zero on a CPU: on some processors several times faster for "
        "PaiNN (a DistillationTrainer does so without this flag)",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log as stock does: the whole config, and where in the code each line comes from",
    )
    return parser


def read_config(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return the config with its includes and the command line's overrides.

    Raises:
        UserError: the file or one that it includes is missing, not YAML, or conflicting.
    """
    path: Path = args.config_yml
    if path.is_dir():
        raise UserError(f"--config-yml {path} is a folder: name a YAML file in it.")
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
    config = usable_config(args, [_as_literal(word) for word in overrides])
    try:
        refuse_renamed_keys(config, f"the config {path}")
    except UserError as error:
        if is_ours(config):
            raise
        logging.warning(f"{error} It is not read.")  # as stock, which has defaults in its place
    check_run_names(config)
    check_blocks(config, path)
    if is_ours(config):
        check_overrides(overrides, read_yaml(path))
    return config


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the trainer that it names is ours."""
    return str(config.get("trainer")).rpartition(".")[2] in ("distillation", "DistillationTrainer")


def check_placed(config: Mapping[str, Any]) -> None:
    """Refuse a distillation that nobody would read, so that a student would be trained plainly.

    Raises:
        UserError: the block is elsewhere than under ``task``, or the trainer is not ours.
    """
    for name, block in {"": config, **config}.items():
        if name != "task" and isinstance(block, Mapping) and OURS[0] in block:
            where = f"{name}.{OURS[0]}" if name else OURS[0]
            raise UserError(
                f"{where} stands where nobody reads it: the block belongs under task, as "
                "task.distillation."
            )
    task = config.get("task")
    given = task.get(OURS[0]) if isinstance(task, Mapping) else None
    if given and not is_null(given) and not is_ours(config):
        trainer = config.get("trainer", "ocp")
        raise UserError(
            f"task.distillation is read by fairchem_kd.DistillationTrainer, and trainer is "
            f"{trainer!r:.60}, which would train plainly: set trainer: "
            "fairchem_kd.DistillationTrainer, or take the block out."
        )


def _as_literal(override: str) -> str:
    """YAML's null, true and false as Python's, since stock takes them for text."""
    key, _, value = override.partition("=")
    return f"{key}={_YAML_LITERALS.get(value, value)}"
