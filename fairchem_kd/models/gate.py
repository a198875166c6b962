"""What a checkpoint may say before anything is made of it.

fairchem evaluates the names of transforms and metrics, and imports and calls whatever a dotted
name points to, so that reading weights alone without unpickling is not enough: the ``config`` of a
file is code as far as stock is concerned. Every checkpoint that is not trusted passes here, once,
when it is read; what the schema below does not know is refused with its key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fairchem_kd.errors import did_you_mean
from fairchem_kd.text import on_one_line

#: A config is a page of text; one that is a thousand times that is made to exhaust memory.
MAX_DEPTH = 40
MAX_VALUES = 100_000
MAX_TEXT = 100_000

#: Import paths that a file of ours or of a run with us may hold.
KNOWN_PATHS = (
    "fairchem_kd.DistillationTrainer",
    "fairchem_kd.trainer.DistillationTrainer",
    "fairchem_kd.distillation.trainer.DistillationTrainer",
)
#: All that stock's DataTransforms has to evaluate: two that it passes over, and one function.
TRANSFORMS = ("normalizer", "element_references", "decompose_tensor")

#: Keys whose values are names of files or free text, which nothing imports: a dot is no harm.
_TEXT = {
    *("src", "file", "path", "checkpoint", "starting_checkpoint", "pattern", "splits", "rhv"),
    *("identifier", "timestamp_id", "note", "description", "comment", "project", "entity", "group"),
    *("lin_ref", "oc20_ref", "elements"),
}
_TEXT_ENDS = ("_file", "_path", "_dir", "_ref", "_checkpoint", "_id")
#: Blocks of which nothing is looked up: what the command line and the scheduler were given.
_FREE = ("cmd", "slurm")
_DOTTED = re.compile(r"\s*[A-Za-z_]\w*(\.\w+)+\s*")

_DATASETS = ("dataset", "val_dataset", "test_dataset", "relax_dataset")
_MAPPINGS = ("task", "optim", "outputs", "cmd", "slurm", "model_attributes", *_DATASETS)
#: The largest that a model is built with, by what the key's name holds; the first that fits counts.
#: Bases are worked out with symbols or by searching roots, which takes for ever beyond these.
_LARGEST = (
    (("neighbors", "elements", "samples"), 1_000_000),
    (("spherical", "degree", "order", "resolution", "l_max", "lmax", "mmax"), 128),
    (("num_layers", "num_blocks", "num_interactions"), 1000),
    (("radial", "gaussians", "rbf", "basis"), 16_384),
    (("",), 1_000_000),
)
_LENGTHS = ("cutoff", "max_radius")


class NotAllowed(Exception):
    """What a file holds that no checkpoint needs; ``needs_trust`` where it could run code."""

    def __init__(self, message: str, *, needs_trust: bool = False) -> None:
        super().__init__(message)
        self.needs_trust = needs_trust


def check_plain(config: Any, key: str = "config") -> None:
    """Refuse what is not a small tree of plain values.

    Raises:
        NotAllowed: with the key.
    """
    stack: list[tuple[str, Any, int]] = [(key, config, 0)]
    seen = 0
    while stack:
        where, value, depth = stack.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise NotAllowed(f"its {key} has more than {MAX_VALUES:,} values")
        if depth > MAX_DEPTH:
            raise NotAllowed(f"its {key} is more than {MAX_DEPTH} levels deep (or holds itself)")
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if not isinstance(name, str | int | float | bool):
                    raise NotAllowed(f"{where} has a key of type {type(name).__name__}")
                stack.append((f"{where}.{_shown(name)}", inner, depth + 1))
        elif isinstance(value, list | tuple | set | frozenset):
            stack += [(f"{where}[{number}]", one, depth + 1) for number, one in enumerate(value)]
        elif isinstance(value, str | bytes):
            if len(value) > MAX_TEXT:
                raise NotAllowed(f"{where} is a text of {len(value):,} characters")
        elif not isinstance(value, int | float | bool | None | torch.device):
            raise NotAllowed(f"{where} is a {type(value).__name__}, which no config holds")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that could have fairchem import, evaluate or build what no config needs.

    Raises:
        NotAllowed: with the key.
    """
    check_plain(config)
    _check_text(config)
    for key in _MAPPINGS:
        _mapping(config.get(key), f"config.{key}")
    _name(config.get("trainer"), "config.trainer", paths=KNOWN_PATHS)
    logger = config.get("logger")
    _name(logger.get("name") if isinstance(logger, Mapping) else logger, "config.logger")
    optim = _mapping(config.get("optim"), "config.optim")
    _name(optim.get("optimizer"), "config.optim.optimizer")
    _name(optim.get("scheduler"), "config.optim.scheduler")
    _check_model(config)
    for key in _DATASETS:
        _check_dataset(_mapping(config.get(key), f"config.{key}"), f"config.{key}")
    for key in ("loss_functions", "loss_fns"):
        _check_losses(config.get(key), f"config.{key}")
    for key in ("evaluation_metrics", "eval_metrics"):
        _check_metrics(_mapping(config.get(key), f"config.{key}"), f"config.{key}")
    _check_distillation(_mapping(config.get("task"), "config.task"))


def without_trust(config: Any) -> None:
    """Take out what a file must not decide: whether the teacher that it names is unpickled."""
    task = config.get("task") if isinstance(config, Mapping) else None
    block = task.get("distillation") if isinstance(task, Mapping) else None
    teacher = block.get("teacher") if isinstance(block, Mapping) else None
    if isinstance(teacher, dict) and "trust_checkpoint" in teacher:
        teacher["trust_checkpoint"] = False


def check_weights(contents: Mapping[str, Any]) -> None:
    """Refuse entries beside the config that are not what stock writes there.

    Raises:
        NotAllowed: with the key.
    """
    for name, value in contents["state_dict"].items():
        if not isinstance(name, str):
            raise NotAllowed(f"state_dict has the key {name!r:.40}, which names no weight")
        if isinstance(value, torch.Tensor):
            _check_tensor(value, f"state_dict.{_shown(name)}")
        elif not name.endswith("_extra_state"):
            kind = type(value).__name__
            raise NotAllowed(f"state_dict.{_shown(name)} is a {kind}, not a tensor")
    for key in ("normalizers", "elementrefs"):
        for target, state in _mapping(contents.get(key), key).items():
            for part, value in _mapping(state, f"{key}.{_shown(target)}").items():
                if isinstance(value, torch.Tensor):
                    _check_tensor(value, f"{key}.{_shown(target)}.{_shown(part)}")
    _mapping(contents.get("scale_dict"), "scale_dict")
    ema = contents.get("ema")
    if ema:
        shadow = _mapping(ema, "ema").get("shadow_params")
        if not isinstance(shadow, list | tuple) or not all(
            isinstance(one, torch.Tensor) for one in shadow
        ):
            raise NotAllowed("ema.shadow_params is not a list of tensors")
        for number, one in enumerate(shadow):
            _check_tensor(one, f"ema.shadow_params[{number}]")


def _check_model(config: Mapping[str, Any]) -> None:
    model = config.get("model")
    if isinstance(model, str):
        _name(model, "config.model")
        model = {}
    if not isinstance(model, Mapping) or model.get("name", "") is None:
        raise NotAllowed("config.model names no model")
    _name(model.get("name"), "config.model.name")
    backbone = _mapping(model.get("backbone"), "config.model.backbone")
    _name(backbone.get("model"), "config.model.backbone.model")
    for head, options in _mapping(model.get("heads"), "config.model.heads").items():
        where = f"config.model.heads.{head}"
        _name(_mapping(options, where).get("module"), f"{where}.module")
    if not backbone and model.get("finetune_config"):
        raise NotAllowed(
            "config.model.finetune_config has the model built from another file", needs_trust=True
        )
    attributes = _mapping(config.get("model_attributes"), "config.model_attributes")
    for tree, where in ((model, "config.model"), (attributes, "config.model_attributes")):
        for key, name, value in _leaves(tree, where):
            _check_size(key, name, value)


def _check_size(key: str, name: str, value: Any) -> None:
    """No model has a billion layers, or a cutoff that is no length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    largest = next(size for words, size in _LARGEST if any(word in name for word in words))
    if not math.isfinite(value) or abs(value) > largest:
        raise NotAllowed(f"{key} is {value}, and no model is built with that")
    if (name in _LENGTHS or name.startswith("hidden")) and value <= 0:
        raise NotAllowed(f"{key} is {value}, and has to be above 0")


def _check_dataset(block: Mapping[str, Any], where: str) -> None:
    _name(block.get("format"), f"{where}.format")
    transforms = _mapping(block.get("transforms"), f"{where}.transforms")
    for name in transforms:
        if name not in TRANSFORMS:
            raise NotAllowed(
                f"{where}.transforms has {name!r:.80}, and stock evaluates the name of a transform",
                needs_trust=True,
            )
    for key, settings in block.items():  # of splits, of unlabelled structures, of sets of sets
        if isinstance(settings, Mapping) and key != "transforms":
            _check_dataset(settings, f"{where}.{_shown(key)}")


def _check_losses(losses: Any, where: str) -> None:
    if losses is None:
        return
    if not isinstance(losses, list | tuple):
        raise NotAllowed(f"{where} is not a list of losses")
    for number, entry in enumerate(losses):
        for target, options in _mapping(entry, f"{where}[{number}]").items():
            here = f"{where}[{number}].{target}"
            _name(_mapping(options, here).get("fn"), f"{here}.fn")


def _check_metrics(block: Mapping[str, Any], where: str) -> None:
    from fairchem_kd.stock.options import known_metrics

    for target, names in _mapping(block.get("metrics"), f"{where}.metrics").items():
        for name in names if isinstance(names, list | tuple | dict | set) else [names]:
            if name is None:
                continue
            if not isinstance(name, str) or name not in known_metrics():
                hint = did_you_mean(str(name)[:60], sorted(known_metrics()))
                raise NotAllowed(
                    f"{where}.metrics.{target} has {name!r:.80}, and stock evaluates the name of a "
                    f"metric{hint}",
                    needs_trust=True,
                )


def _check_distillation(task: Mapping[str, Any]) -> None:
    block = _mapping(task.get("distillation"), "config.task.distillation")
    losses = _mapping(block.get("losses"), "config.task.distillation.losses")
    for name, term in losses.items():
        if isinstance(term, Mapping):
            _name(term.get("kind"), f"config.task.distillation.losses.{name}.kind")
    _check_dataset(task, "config.task")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise NotAllowed(f"{where} is a {type(value).__name__}, not a mapping of keys")
    return value


def _name(value: Any, where: str, paths: tuple[str, ...] = ()) -> None:
    """A name that fairchem looks up: without a dot it imports nothing."""
    if value is None:
        return
    if not isinstance(value, str):
        raise NotAllowed(f"{where} is a {type(value).__name__}, not a name")
    if not value.isidentifier() and value not in paths:
        raise NotAllowed(
            f"{where} is an import path, {value!r:.120}, and importing and calling that could run "
            "any code",
            needs_trust=True,
        )


def _check_text(config: Mapping[str, Any]) -> None:
    """Refuse import paths wherever stock could look one up, of this release's keys or another's."""
    for block, tree in config.items():
        if block in _FREE or block in _TEXT or str(block).endswith(_TEXT_ENDS):
            continue
        for key, name, value in _leaves(tree, f"config.{_shown(block)}", str(block)):
            if not isinstance(value, str) or name in _TEXT or name.endswith(_TEXT_ENDS):
                continue
            if _DOTTED.fullmatch(value) and value not in KNOWN_PATHS:
                raise NotAllowed(
                    f"{key} is an import path, {value!r:.120}, and importing and calling that "
                    "could run any code",
                    needs_trust=True,
                )


def _check_tensor(value: torch.Tensor, where: str) -> None:
    """A tensor as stock writes it: dense, and no larger than what the file holds of it."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise NotAllowed(f"{where} is no dense tensor of numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise NotAllowed(f"{where} claims {tuple(value.shape)}, which is more than the file holds")


def _shown(name: Any) -> str:
    """A key of a file in a message: short, on one line, and nothing that a terminal obeys."""
    return on_one_line(str(name)[:60])


def _leaves(tree: Any, where: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """``(key, last name, value)`` of every value of a tree that is known to be small."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{where}.{_shown(key)}", str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{where}[{number}]", name)
    else:
        yield where, name, tree
