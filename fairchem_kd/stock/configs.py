"""Stock's reading of configs: YAML with its includes, and the command line's values."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairchem.core.common import utils
from fairchem.core.common.flags import flags

from fairchem_kd import reading
from fairchem_kd.errors import UserError
from fairchem_kd.reading import Unreadable
from fairchem_kd.stock.noise import without_the_untold

MAX_FILES = 200  # that a config includes, those of its includes counted each time


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid YAML, has a key twice, or stands for too much.
    """
    return reading.read_yaml(path, utils.UniqueKeyLoader)


def load_config(path: str | Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """A config with its includes; the keys that it overwrites, and those that two includes give.

    Raises:
        OSError: it, or what it includes, cannot be read.
        ValueError: one of the files is no config.
    """
    check_files(path)
    return utils.load_config(str(path))


def build_config(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Stock's: the config that ``args.config_yml`` names, with flags and overrides in it.

    Raises:
        OSError, ValueError: see :func:`load_config`.
        AttributeError, TypeError: overrides that do not fit.
    """
    check_files(args.config_yml)
    with without_the_untold():
        return utils.build_config(args, list(overrides))


def check_files(path: str | Path) -> None:
    """Refuse files of a config that are none, before stock reads them, which has no bounds.

    Raises:
        OSError, ValueError: see :func:`load_config`.
    """
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(Path(path), ())]
    read: dict[Path, list[str]] = {}
    for _ in range(MAX_FILES):
        if not waiting:
            return
        file, above = waiting.pop()
        if file in above:
            raise Unreadable(f"{file} includes itself, by way of {above[-1]}")
        if file not in read:
            read[file] = _includes(file, named=bool(above))
        for name in read[file]:
            try:
                found = utils.find_relative_file_in_paths(name, [os.path.dirname(file)])
            except ValueError:
                raise Unreadable(
                    f"{file} includes {name}, which is neither in the current directory, "
                    f"{Path.cwd()}, nor beside it: fix the path, or go to the folder from which "
                    "it holds"
                ) from None
            waiting.append((Path(found), (*above, file)))
    raise Unreadable(f"it includes more than {MAX_FILES} files, those of its includes counted")


def _includes(file: Path, *, named: bool) -> list[str]:
    """The files that a config includes."""
    where = f"{file}: " if named else ""
    try:
        config = read_yaml(file)
    except Unreadable as error:
        raise Unreadable(f"{where}{error}") from error
    if not isinstance(config, dict):
        raise Unreadable(f"{where}it is not a mapping of keys")
    includes = config.get("includes", [])
    if not isinstance(includes, list) or not all(isinstance(one, str) for one in includes):
        raise Unreadable(f"{where}its includes are no list of files, but {includes!r:.80}")
    return includes


def as_on_the_command_line(value: Any) -> Any:
    """A string as stock's command line would read it: ``1e-4``, text in YAML, is a number."""
    if not isinstance(value, str):
        return value
    try:
        return utils.parse_value(value)
    except (RecursionError, MemoryError):  # thousands of brackets or signs
        return value


def training_config(path: Path) -> dict[str, Any]:
    """The config that ``fairchem --mode train --config-yml PATH`` would run.

    Raises:
        UserError: there is none, it or what it includes cannot be read, or it is of no training.
    """
    if not path.is_file():
        raise UserError(f"The config {path} does not exist.")
    args = flags.get_parser().parse_args(["--mode", "train", "--config-yml", str(path)])
    config = usable_config(args, [])
    check_blocks(config, path)
    return config


def usable_config(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """What :func:`build_config` reads.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return build_config(args, overrides)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"the config {args.config_yml} cannot be used: {reason}") from error


def check_blocks(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config without what every training has.

    Raises:
        UserError: naming what is not there.
    """
    missing = [key for key in ("model", "dataset", "optim") if key not in config]
    if missing:
        near = difflib.get_close_matches("includes", map(str, config), n=1)
        meant = f"; nobody reads its '{near[0]}' (did you mean 'includes'?)" if near else ""
        raise UserError(f"the config {path} has no {' and no '.join(missing)} block{meant}.")
