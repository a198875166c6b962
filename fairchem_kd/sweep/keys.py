"""Setting keys of a fairchem config by their dotted path, and refusing those that no config has.

A typo in a sweep would otherwise cost a whole array of runs that differ in nothing. What a config
may have is known in three ways: it stands in the base config; it is in the lists below, from
fairchem-core 1.10 and PyTorch; or the model's or the scheduler's signature has it. Whatever is
under ``task.distillation`` is checked by its own schema.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from fairchem_kd.distillation.config import WHERE, parse_distillation
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.schema import is_null

_TOP = (
    "amp",
    "checkpoint",
    "cpu",
    "dataset",
    "evaluation_metrics",
    "flush_denormal",
    "gp_gpus",
    "hide_eval_progressbar",
    "logger",
    "loss_functions",
    "model",
    "noddp",
    "optim",
    "outputs",
    "print_every",
    "seed",
    "slurm",
    "task",
    "trainer",
)
_OPTIM = (
    "batch_size",
    "checkpoint_every",
    "clip_grad_norm",
    "denoising_pos_params",
    "ema_decay",
    "energy_coefficient",
    "eval_batch_size",
    "eval_every",
    "force_coefficient",
    "load_balancing",
    "load_balancing_on_error",
    "load_datasets_and_model_then_exit",
    "loss_energy",
    "loss_forces",
    "lr_gamma",
    "lr_initial",
    "lr_milestones",
    "max_epochs",
    "num_workers",
    "optimizer",
    "optimizer_params",
    "scheduler",
    "scheduler_params",
    "use_denoising_pos",
    "warmup_epochs",
    "warmup_factor",
    "warmup_steps",
    "weight_decay",
)
_TASK = (
    "dataset",
    "distillation",
    "eval_relaxations",
    "num_relaxation_batches",
    "prediction_dtype",
    "relax_cell",
    "relax_dataset",
    "relax_opt",
    "relax_volume",
    "relaxation_fmax",
    "relaxation_steps",
    "save_full_traj",
    "set_deterministic_scatter",
    "strict_load",
    "write_pos",
)
#: The blocks whose keys are known; all other blocks are fairchem's or a library's to check.
_KNOWN = {
    "": _TOP,
    "optim": _OPTIM,
    "task": _TASK,
    "dataset": ("train", "val", "test", "relax"),
    "evaluation_metrics": ("metrics", "primary_metric"),
}


def with_values(base: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of the config ``base`` with ``values`` (by dotted key) set in it, in their order.

    Args:
        where: the sweep, for messages.

    Raises:
        UserError: a key that no config has, or options of a distillation loss that do not fit.
    """
    config = copy.deepcopy(dict(base))
    for key, value in values.items():
        _check_key(config, key, where)
        _set_key(config, key, copy.deepcopy(value), where)
    if any(key.split(".")[0] == "task" for key in values):
        try:
            parse_distillation(config.get("task"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return config


def _set_key(config: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for done, name in enumerate(parents):
        child = _child(node, name)
        if child is None:  # missing, or switched off in the base: a new block
            child = node[name] = {}
        elif not isinstance(child, (dict, list)):
            block = ".".join(parents[: done + 1])
            raise UserError(f"{where}: {key} cannot be set, because {block} is {child!r}.")
        node = child
    node[int(last) if isinstance(node, list) else last] = value


def _child(node: Any, name: str) -> Any:
    """What ``node`` has under ``name``; None where it has nothing, or null."""
    if isinstance(node, list):
        return node[int(name)]
    child = node.get(name)
    return None if is_null(child) or child == "{}" else child


def _check_key(config: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a key that neither ``config`` has nor any config is known to have."""
    if key.startswith(f"{WHERE}.") or key == WHERE:
        trainer = str(config.get("trainer", "ocp"))
        if trainer.isidentifier() and trainer != "distillation":
            raise UserError(
                f"{where}: {key} has no effect, because the config's trainer is {trainer}; set "
                "trainer: fairchem_kd.DistillationTrainer."
            )
        return  # its schema checks it
    node: Any = config
    parts = key.split(".")
    for depth, name in enumerate(parts):
        block = ".".join(parts[:depth])
        if isinstance(node, list):
            if not (name.isdigit() and int(name) < len(node)):
                raise UserError(
                    f"{where}: no config has the key {key}: {block} is a list of {len(node)}, "
                    f"whose items are {block}.0 and on."
                )
        elif not isinstance(node, Mapping):
            return  # `_set_key` says so
        elif name not in node:
            _check_new(config, node, block, name, key, where, last=depth == len(parts) - 1)
            return
        node = _child(node, name)
        if node is None:
            return


def _check_new(
    config: Mapping[str, Any],
    siblings: Iterable[str],
    block: str,
    name: str,
    key: str,
    where: str,
    *,
    last: bool,
) -> None:
    """Refuse ``name`` in ``block`` unless configs are known, or free, to have it there."""
    known = {str(sibling) for sibling in siblings} | set(_KNOWN.get(block, ()))
    strict = block in _KNOWN
    if block == "optim":
        known |= _scheduler_parameters(config)
    elif block in ("model", "model.backbone"):
        parameters, strict = _model_parameters(config, block)
        known |= parameters
    elif not strict and not last:
        strict = True  # a block inside a block that does not have it
    near_miss = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0.8)
    if name in known or not (strict or near_miss):
        return
    place = f"{block} has no '{name}'" if block else f"there is no '{name}'"
    raise UserError(
        f"{where}: no config has the key {key}: {place}{did_you_mean(name, known)}; if it is a key "
        "of your own, give it a value in the base config."
    )


def _scheduler_parameters(config: Mapping[str, Any]) -> set[str]:
    """The arguments of the config's scheduler, which fairchem takes out of ``optim``."""
    import torch

    name = (config.get("optim") or {}).get("scheduler")
    scheduler = getattr(torch.optim.lr_scheduler, str(name), None)
    return set(inspect.signature(scheduler).parameters) if scheduler else set()


def _model_parameters(config: Mapping[str, Any], block: str) -> tuple[set[str], bool]:
    """The arguments of the config's model, and whether it takes no others."""
    from fairchem_kd.models.build import model_class

    model = config.get("model")
    if not isinstance(model, Mapping):
        return set(), False
    name = model.get("name") if block == "model" else (model.get("backbone") or {}).get("model")
    if not name:
        return set(), False
    try:
        parameters = inspect.signature(model_class(str(name))).parameters.values()
    except (RuntimeError, ImportError, ValueError):
        return set(), False  # fairchem says so when it builds the model
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    return names | {"name", "model", "otf_graph"}, not free
