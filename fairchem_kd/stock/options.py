"""The stock part of a training's config, read as `task.distillation` is: typed, ranged, by name.

Stock reads its config as it goes, so that a slip ends in a traceback of its insides, sometimes
hours later, or is not seen at all. What is known here is checked and coerced before anything is
loaded; what is merely not known stays as it is, unless it is a near miss of a key that stock has.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.reading import read_json
from fairchem_kd.schema import is_null, read_value
from fairchem_kd.stock.conservative import check_conservative
from fairchem_kd.stock.named_files import check_loadable, check_units
from fairchem_kd.stock.option_table import (
    BLOCKS,
    DATASET,
    OPTIM,
    coerce,
    mapping,
    refuse_near_misses,
)
from fairchem_kd.stock.softness import check_softness
from fairchem_kd.stock.transform_options import check_normalizer, check_transforms

#: What ``scheduler`` may be beside the names of torch.optim.lr_scheduler.
_NO_SCHEDULER = "Null"
_LAMBDA = ("warmup_steps", "warmup_factor", "lr_milestones", "lr_gamma")
_POSITIVE = ("cutoff", "max_radius", "max_neighbors")
_LOGGERS = ("tensorboard", "wandb")


def check_training_config(config: dict[str, Any]) -> None:
    """Check the stock part of the config of a training, and coerce its numbers in place.

    Raises:
        UserError: one sentence naming the key, what is wrong, and what it may be.
    """
    refuse_near_misses(config, BLOCKS, "the config")
    _optim(config)
    _model(config)
    splits = config.get("dataset")
    for split, settings in splits.items() if isinstance(splits, Mapping) else ():
        if settings is not None and split in ("train", "val", "test", "relax"):
            _dataset(settings, f"dataset.{split}", train=split == "train")
    check_transforms(config.get("dataset"), _targets(config))
    task = config.get("task")
    if not isinstance(task, Mapping | None):
        raise UserError(f"task must be a mapping of keys, not {task!r:.60}.")
    check_conservative(config, ours=True)
    distillation = (task or {}).get("distillation")
    unlabelled = distillation.get("unlabelled") if isinstance(distillation, Mapping) else None
    if isinstance(unlabelled, Mapping) and isinstance(unlabelled.get("dataset"), Mapping):
        _dataset(unlabelled["dataset"], "task.distillation.unlabelled.dataset", train=False)
    check_softness(config, ours=True)
    if config.get("loss_functions") or not (task or {}).get("dataset"):
        _outputs(config)  # else OCP's config, out of which stock makes these blocks
        _losses(config)
        _metrics(config)
    _logger(config.get("logger"))


def check_overrides(overrides: Sequence[str], own: Iterable[str]) -> None:
    """Refuse overrides of the command line that no part of a config has.

    Args:
        overrides: ``--KEY=VALUE``.
        own: blocks that the config's file has.

    Raises:
        UserError: it names no block, or is empty.
    """
    for word in overrides:
        key, _, value = word.removeprefix("--").partition("=")
        block = key.split(".")[0]
        if block not in BLOCKS and block not in own:
            raise UserError(
                f"the argument {word!r} overrides a key of '{block}', which no config has"
                f"{did_you_mean(block, BLOCKS)}."
            )
        if not key or not value or key.endswith(".") or ".." in key:
            raise UserError(f"the argument {word!r} needs a key and a value: --KEY=VALUE.")


def _optim(config: dict[str, Any]) -> None:
    optim = mapping(config.get("optim"), "optim")
    import torch
    from torch.optim import lr_scheduler

    schedulers = _names(lr_scheduler, lr_scheduler.LRScheduler)
    given = optim.get("scheduler")
    own: set[str] = set()
    if isinstance(given, str) and given in schedulers:
        own = set(inspect.signature(getattr(lr_scheduler, given)).parameters)
    refuse_near_misses(optim, {*OPTIM, *own}, "optim")
    for key in ("max_epochs", "lr_initial"):
        if key not in optim:
            raise UserError(f"optim.{key} is required but not given.")
    optim.setdefault("num_workers", 0)
    for key in ("batch_size", "num_workers", "max_epochs", "lr_initial"):
        if key in optim and is_null(optim[key]):
            raise UserError(f"optim.{key} must be a number, not null.")
    for key in ("eval_batch_size", "eval_every", "checkpoint_every"):
        if key in optim and is_null(optim[key]):
            del optim[key]  # stock's default
    if "scheduler" in optim and is_null(optim["scheduler"]):
        optim["scheduler"] = _NO_SCHEDULER
    coerce(optim, OPTIM, "optim")
    _numbers(optim.get("optimizer_params") or {}, "optim.optimizer_params")
    optimizers = _names(torch.optim, torch.optim.Optimizer)
    if optim.get("optimizer", "AdamW") not in optimizers:
        name = optim["optimizer"]
        raise UserError(f"optim.optimizer cannot be {name!r}{did_you_mean(name, optimizers)}.")
    _optimizer(optim)
    if "scheduler" in optim:
        name = optim["scheduler"]
        if name not in schedulers and name != _NO_SCHEDULER:
            hint = did_you_mean(name, [*schedulers, _NO_SCHEDULER])
            raise UserError(f"optim.scheduler cannot be {name!r}{hint}.")
        if name != _NO_SCHEDULER:
            _arguments(getattr(lr_scheduler, name), optim, f"optim.scheduler {name}")
    else:
        missing = [key for key in _LAMBDA if key not in optim]
        if missing:
            raise UserError(
                f"optim.scheduler is missing, and stock's default needs {', '.join(missing)}: give "
                "for example scheduler: CosineAnnealingLR with T_max, or 'Null' for none."
            )


def _optimizer(optim: Mapping[str, Any]) -> None:
    """Make sure that the optimiser takes its parameters.

    Raises:
        UserError: it does not.
    """
    import torch

    name, where = optim.get("optimizer", "AdamW"), "optim.optimizer_params"
    made, given = getattr(torch.optim, name), optim.get("optimizer_params") or {}
    refuse_near_misses(given, inspect.signature(made).parameters, where)
    try:
        made([torch.nn.Parameter(torch.zeros(1))], lr=optim["lr_initial"], **given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} do not fit {name}: {' '.join(str(error).split())[:200]}."
        ) from error


def _arguments(scheduler: Any, optim: Mapping[str, Any], where: str) -> None:
    """Refuse a scheduler without what it needs."""
    for name, parameter in inspect.signature(scheduler).parameters.items():
        if name != "optimizer" and parameter.default is parameter.empty and name not in optim:
            raise UserError(f"{where} needs optim.{name}, which is not given.")


def _names(module: Any, base: type) -> list[str]:
    return sorted(
        name
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, base) and not name.startswith("_")
    )


def _numbers(block: dict[str, Any], where: str) -> None:
    """Read text that spells a number as one (YAML takes 1e-3 for text), and refuse NaN."""
    for key, value in mapping(block, where).items():
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue
            block[key] = int(value) if math.isfinite(value) and value == int(value) else value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{key} must be a number, not {value}.")


@cache
def _registered(kind: str) -> tuple[str, ...]:
    from fairchem.core.common.registry import registry
    from fairchem.core.common.utils import setup_imports

    from fairchem_kd.stock.plugin import register

    setup_imports()
    register()
    return tuple(sorted(registry.mapping[f"{kind}_name_mapping"]))


def _name(value: Any, kind: str, where: str) -> None:
    """Refuse a name that stock has not; an import path is looked up later."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be a name, not {value!r:.60}.")
    known = _registered(kind)
    if "." not in value and value not in known:
        raise UserError(f"{where} cannot be {value!r}{did_you_mean(value, known)}.")


def _model(config: dict[str, Any]) -> None:
    model = mapping(config.get("model"), "model")
    if is_null(model.get("name")):
        raise UserError(f"model.name is required{did_you_mean('', _registered('model'))}.")
    _name(model["name"], "model", "model.name")
    blocks = [(model, "model")]
    if isinstance(model.get("backbone"), dict):
        blocks.append((model["backbone"], "model.backbone"))
    for block, where in blocks:
        _numbers({k: v for k, v in block.items() if isinstance(v, str)}, where)
        for key, value in block.items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                continue
            if key in _POSITIVE or key.startswith(("hidden", "num_", "emb_size")):
                number = read_value(float, value, f"{where}.{key}", {})
                if number <= 0:
                    raise UserError(f"{where}.{key} must be greater than 0, not {value}.")
                block[key] = int(number) if number == int(number) and key != "cutoff" else number
        _scales(block.get("scale_file"), f"{where}.scale_file")


def _scales(given: Any, where: str) -> None:
    if is_null(given):
        return
    if isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            raise UserError(
                f"{where}: {path.absolute()} does not exist; fix the path, or fit the factors with "
                "`fairchem-kd fit-scales`."
            )
        if path.suffix != ".json":
            return check_loadable(given, where)
        try:
            given = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {path} cannot be read as JSON ({error}).") from None
    for name, value in mapping(given, where).items():
        if name == "comment":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}.{name} must be a number, not {value!r:.60}.")
        if not math.isfinite(value) or value == 0:
            raise UserError(
                f"{where}.{name} is {value}, and no scale factor; fit the factors anew."
            )


def _dataset(settings: Any, where: str, *, train: bool) -> None:
    settings = mapping(settings, where)
    if not settings:
        return
    refuse_near_misses(settings, DATASET, where)
    src = settings.get("src")
    if is_null(src):
        raise UserError(f"{where}.src is required: where the data are.")
    if not isinstance(src, str) and not (
        isinstance(src, list | tuple) and src and all(isinstance(one, str) for one in src)
    ):
        raise UserError(f"{where}.src must be a path or a list of paths, not {src!r:.60}.")
    coerce(settings, DATASET, where)
    if "format" in settings:
        _name(settings["format"], "dataset", f"{where}.format")
    transforms = settings.get("transforms") or {}
    normalizer = transforms.get("normalizer")
    for kind in ("normalizer", "element_references"):
        check_units(transforms.get(kind), f"{where}.transforms.{kind}")
    if normalizer is not None:
        check_normalizer(mapping(normalizer, f"{where}.transforms.normalizer"), where)


def _outputs(config: Mapping[str, Any]) -> None:
    outputs = config.get("outputs")
    if not outputs:
        raise UserError(
            "outputs is missing, what the model predicts: give for example outputs: {energy: "
            "{level: system}, forces: {level: atom}}."
        )
    for name, output in mapping(outputs, "outputs").items():
        level = mapping(output, f"outputs.{name}").get("level", "system")
        if level not in ("system", "atom"):
            hint = did_you_mean(str(level), ["system", "atom"])
            raise UserError(f"outputs.{name}.level cannot be {level!r}{hint}.")


def _targets(config: Mapping[str, Any]) -> list[str]:
    """The outputs, and what they are decomposed into, as far as the config has such."""
    outputs, found = config.get("outputs"), []
    for name, output in outputs.items() if isinstance(outputs, Mapping) else ():
        parts = output.get("decomposition") if isinstance(output, Mapping) else None
        found += [name, *(parts if isinstance(parts, Mapping) else ())]
    return found


def _losses(config: Mapping[str, Any]) -> None:
    losses = config.get("loss_functions")
    if not losses:
        raise UserError(
            "loss_functions is empty, so that nothing is learned: give for example loss_functions: "
            "[{energy: {fn: mae, coefficient: 1}}, {forces: {fn: l2mae, coefficient: 100}}]."
        )
    if not isinstance(losses, list | tuple):
        raise UserError("loss_functions must be a list: - energy: {fn: mae, coefficient: 1}.")
    targets = _targets(config)
    for number, entry in enumerate(losses):
        for target, options in mapping(entry, f"loss_functions[{number}]").items():
            where = f"loss_functions[{number}].{target}"
            if target not in targets:
                hint = did_you_mean(str(target), targets)
                raise UserError(f"{where}: outputs has no '{target}'{hint}.")
            options = mapping(options, where)
            refuse_near_misses(options, ("fn", "coefficient", "reduction"), where)
            _name(options.get("fn", "mae"), "loss", f"{where}.fn")
            if is_null(options.get("coefficient")):
                raise UserError(f"{where}.coefficient is required but not given.")
            coefficient = options["coefficient"]
            options["coefficient"] = read_value(
                float, coefficient, f"{where}.coefficient", {"ge": 0}
            )


def _metrics(config: dict[str, Any]) -> None:
    block = config.get("evaluation_metrics")
    if is_null(block):
        return
    block = mapping(block, "evaluation_metrics")
    refuse_near_misses(block, ("metrics", "primary_metric"), "evaluation_metrics")
    metrics = block.get("metrics")
    if is_null(metrics):
        return
    known, targets, found = sorted(known_metrics()), [*_targets(config), "misc"], []
    for target, names in mapping(metrics, "evaluation_metrics.metrics").items():
        where = f"evaluation_metrics.metrics.{target}"
        if target not in targets:
            raise UserError(f"{where}: outputs has no '{target}'{did_you_mean(target, targets)}.")
        named = [names] if isinstance(names, str) else names or []
        if not isinstance(named, list | tuple):
            raise UserError(f"{where} must be a list of names, not {names!r:.60}.")
        for name in named:
            if name not in known:
                raise UserError(f"{where} cannot be {name!r}{did_you_mean(str(name), known)}.")
            found.append(name if target == "misc" else f"{target}_{name}")
    primary = block.get("primary_metric")
    if not is_null(primary) and primary not in [*found, "loss"]:
        raise UserError(
            f"evaluation_metrics.primary_metric is {primary!r}, which no metric gives"
            f"{did_you_mean(str(primary), found)}."
        )


@cache
def known_metrics() -> frozenset[str]:
    """The functions of stock's evaluator, which is where it evaluates a metric's name."""
    from fairchem.core.modules import evaluator

    found = inspect.getmembers(evaluator, inspect.isfunction)
    return frozenset(name for name, function in found if function.__module__ == evaluator.__name__)


def _logger(logger: Any) -> None:
    if is_null(logger):
        return
    name = logger.get("name") if isinstance(logger, Mapping) else logger
    _name(name, "logger", "logger" if isinstance(logger, str) else "logger.name")
    if name != "wandb" or os.environ.get("WANDB_MODE", "") in ("disabled", "offline", "dryrun"):
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logger is wandb, which is not installed: pip install wandb, or logger: tensorboard."
        ) from None
    key = os.environ.get("WANDB_API_KEY") or getattr(wandb.api, "api_key", None)
    if not key:
        raise UserError(
            "logger is wandb, and nobody is logged in: run `wandb login`, set WANDB_MODE=offline, "
            "or take logger: tensorboard."
        )
