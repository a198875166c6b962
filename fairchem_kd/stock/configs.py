"""Stock's reading of configs: YAML with its includes, and the command line's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fairchem.core.common.flags import flags
from fairchem.core.common.utils import UniqueKeyLoader, build_config, load_config, parse_value

__all__ = ["as_on_the_command_line", "load_config", "read_yaml", "training_config"]


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file.

    Raises:
        ValueError, yaml.YAMLError: it is not valid YAML, or has a key twice.
    """
    return yaml.load(path.read_text("utf-8"), Loader=UniqueKeyLoader)


def as_on_the_command_line(value: Any) -> Any:
    """A string as stock's command line would read it: ``1e-4``, text in YAML, is a number."""
    return parse_value(value) if isinstance(value, str) else value


def training_config(path: Path) -> dict[str, Any]:
    """The config that ``fairchem --mode train --config-yml PATH`` would run."""
    args = flags.get_parser().parse_args(["--mode", "train", "--config-yml", str(path)])
    return build_config(args, [])
