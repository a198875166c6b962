"""What stock takes in the blocks of a config, as tables, and how a block is held against one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fairchem_kd.errors import UserError
from fairchem_kd.schema import read_value

#: Blocks of a config, ours and stock's.
BLOCKS = (
    *("trainer", "task", "model", "dataset", "optim", "outputs", "loss_functions"),
    *("evaluation_metrics", "logger", "slurm", "includes", "amp", "identifier", "seed", "mode"),
    *("hide_eval_progressbar", "checkpoint"),
    *("run_dir", "timestamp_id", "cpu", "is_debug", "gpus", "print_every", "local_rank", "name"),
    *("flush_denormal", "val_dataset", "test_dataset", "relax_dataset", "noddp", "gp_gpus"),
)  # fmt: skip


class Option(NamedTuple):
    """What a key may hold."""

    kind: Any
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


_WHOLE, _COUNT = Option(int, ge=0), Option(int, ge=1)
OPTIM = {
    "batch_size": _COUNT,
    "eval_batch_size": _COUNT,
    "num_workers": _WHOLE,
    "max_epochs": _COUNT,
    "lr_initial": Option(float, gt=0),
    "optimizer": Option(str),
    "optimizer_params": Option(dict[str, Any]),
    "scheduler": Option(str),
    "scheduler_params": Option(dict[str, Any]),
    "clip_grad_norm": Option(float | None, gt=0),
    "ema_decay": Option(float | None, ge=0, lt=1),
    "eval_every": _COUNT,
    "checkpoint_every": Option(int, ge=-1),
    "weight_decay": Option(float, ge=0),
    "warmup_steps": Option(int),
    "warmup_factor": Option(float, ge=0),
    "lr_gamma": Option(float, gt=0),
    "lr_milestones": Option(list[float]),
    "T_max": Option(int, ge=1),
    "eta_min": Option(float, ge=0),
    "factor": Option(float, gt=0),
    "patience": _WHOLE,
    "min_lr": Option(float, ge=0),
    "threshold": Option(float, ge=0),
    "cooldown": _WHOLE,
    "mode": Option(str),
    "gamma": Option(float, gt=0),
    "step_size": _COUNT,
    "milestones": Option(list[int]),
    "load_balancing": Option(str | bool | None),
    "load_balancing_on_error": Option(str | None),
    "energy_coefficient": Option(float, ge=0),
    "force_coefficient": Option(float, ge=0),
    "loss_energy": Option(str),
    "loss_force": Option(str),
    "load_datasets_and_model_then_exit": Option(bool),
}
DATASET = {
    "src": Option(Any),
    "format": Option(str),
    "first_n": Option(int | None, ge=1),
    "sample_n": Option(int | None, ge=1),
    "max_atoms": Option(int | None, ge=1),
    "no_shuffle": Option(bool | None),
    "seed": Option(int),
    "transforms": Option(dict[str, Any] | None),
    "key_mapping": Option(dict[str, Any] | None),
    "use_train_settings": Option(bool),
    "a2g_args": Option(dict[str, Any] | None),
    "build": Option(Any),
    "metadata_path": Option(str | None),
}


def refuse_near_misses(block: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse the near miss of a key, which stock would pass over without a word."""
    names = list(names)
    for key in block:
        if str(key) in names:
            continue
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.8)
        if near:
            raise UserError(f"{where} has an unknown key '{key}' (did you mean '{near[0]}'?).")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A block that has keys; refused by name where it is none."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping of keys, not {value!r:.60}.")
    return value


def coerce(block: dict[str, Any], table: Mapping[str, Option], where: str) -> None:
    """Read the values of a block by a table, in place.

    Raises:
        UserError: one that does not fit, by its key.
    """
    for key, rule in table.items():
        if key not in block:
            continue
        meta = {"ge": rule.ge, "gt": rule.gt, "le": rule.le}
        value = block[key] = read_value(rule.kind, block[key], f"{where}.{key}", meta)
        if rule.lt is not None and value is not None and value >= rule.lt:
            raise UserError(f"{where}.{key} must be below {rule.lt:g}, not {value:g}.")
