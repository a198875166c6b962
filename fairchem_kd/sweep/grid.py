"""A sweep as a list of configs, for the `fairchem` command's ``--sweep-yml``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def sweep_grid(base: dict[str, Any], sweep_yml: Path) -> list[dict[str, Any]]:
    """Every point of a sweep file, with each of its seeds, in a copy of the config ``base``.

    Stock's ``create_grid`` needs ``collections.MutableMapping``, gone since Python 3.10. This one
    reads the same files: nested keys (or dotted ones) whose leaves are lists of values; and those
    of `fairchem-kd sweep` (:mod:`fairchem_kd.sweep.spec`), whose base config it leaves to the
    command. Values are read as those of the command line are, so ``1e-4``, a string in YAML, is a
    number here.

    Raises:
        UserError: the file is missing, is no sweep, or has a key that no config has.
    """
    # Only a sweep needs it, and this module is imported by every training.
    from fairchem_kd.sweep.keys import with_values
    from fairchem_kd.sweep.spec import read_sweep

    sweep = read_sweep(sweep_yml, given_with="--sweep-yml")
    grid: list[dict[str, Any]] = []
    for point in sweep.points:
        config = with_values(base, point.values, str(sweep_yml))
        for seed in sweep.seeds if sweep.seeds is not None else [None]:
            one = copy.deepcopy(config)
            if seed is not None:
                one["seed"] = seed
            one["identifier"] = f"{base.get('identifier') or ''}_run{len(grid)}"
            grid.append(one)
    return grid
