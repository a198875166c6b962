"""The stock model of a checkpoint, built with its weights, normalisers and references."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_state_dict, setup_imports
from fairchem.core.modules.normalization.element_references import (
    LinearReferences,
    create_element_references,
)
from fairchem.core.modules.normalization.normalizer import Normalizer, create_normalizer
from fairchem.core.modules.scaling import ScaleFactor
from fairchem.core.modules.scaling.compat import load_scales_compat
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.features import stock_model_config
from fairchem_kd.models.legacy import modern, modern_config, scale_file
from fairchem_kd.reading import read_json
from fairchem_kd.stock.configs import load_config
from fairchem_kd.stock.conservative import is_conservative
from fairchem_kd.stock.gradient_forces import give_gradient_forces
from fairchem_kd.stock.scales import scale_file_key
from fairchem_kd.stock.search import look_before_searching


def _unfitted(config: Mapping[str, Any], name: str, error: str) -> str:
    which = error.split(" is not fitted", 1)[0]
    path, key = scale_file(config), scale_file_key(config["model"])
    if path is not None and not Path(path).exists():
        return (
            f"{name} has unfitted scale factors ({which}): it was trained with those of the file "
            f"{path} ({key} in its config), which is not here; put that file there, relative to "
            "the current directory, or take a checkpoint that holds them."
        )
    return (
        f"{name} has unfitted scale factors, so it was not trained properly ({which}); fit them "
        f"(`fairchem-kd fit-scales`), set {key} and train it again."
    )


def model_class(name: str) -> type[nn.Module]:
    """The class that fairchem knows by a name.

    Raises:
        RuntimeError, ImportError, ValueError: there is none.
    """
    setup_imports()
    return registry.get_model_class(name)


def build_model(checkpoint: Mapping[str, Any], name: str) -> nn.Module:
    """The bare stock model of a checkpoint, on the CPU, with its (EMA) weights.

    One that was trained with ``task.conservative`` gives forces that are its energy's slope.

    Raises:
        UserError: it cannot be built, or the weights do not fit.
    """
    checkpoint = modern(checkpoint, name)
    config = model_config(checkpoint["config"])
    setup_imports()
    look_before_searching()
    try:
        model_class = registry.get_model_class(config["name"])
    except RuntimeError as error:
        raise UserError(
            f"{name} cannot be built from its own config: this fairchem-core has no model "
            f"'{config['name']}' (it has {', '.join(_models())}); import the package that defines "
            "the model first, or take a checkpoint of one of these."
        ) from error
    options = {key: value for key, value in config.items() if key != "name"}
    _check_size(model_class, options, checkpoint["state_dict"], name)
    try:
        model = model_class(**options)
    except Exception as error:  # whatever an architecture makes of arguments that it does not have
        raise UserError(
            f"{name} cannot be built from its own config, model '{config.get('name')}' "
            f"({type(error).__name__}: {error}); it was written by another version of "
            "fairchem-core: use a checkpoint of a model that this one has."
        ) from error
    load_weights(model, checkpoint, name)
    try:
        if is_conservative(checkpoint["config"]):
            give_gradient_forces(model, read_units(checkpoint)[0])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return model


def _check_size(
    model_class: type[nn.Module], options: Mapping[str, Any], state: Mapping[str, Any], name: str
) -> None:
    """Refuse a config that describes a far larger model than the weights are of.

    Where its numbers could mean one, it is built without memory first. A file of a few kilobytes
    would otherwise have as much memory taken as there is.

    Raises:
        UserError: it does.
    """
    held = sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))
    sizes = [n for n in _numbers(options) if n > 64]
    if math.prod(sorted(sizes)[-2:]) * max(len(sizes), 8) * 64 <= 4 * held + 50_000_000:
        return
    try:
        with torch.device("meta"):
            described = sum(p.numel() for p in model_class(**copy.deepcopy(options)).parameters())
    except Exception:  # of a model that cannot be built so; it is built as it is
        return
    if described > 2 * held + 1_000_000:
        raise UserError(
            f"The config in {name} describes a model of {described:,} parameters, and its weights "
            f"are {held:,}: the file is damaged, or made to exhaust memory; take another copy."
        )


def _numbers(tree: Any) -> Iterator[int]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _numbers(value)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield tree


def _models() -> list[str]:
    """The models that fairchem knows by name, without the parts of hydras."""
    names = registry.mapping["model_name_mapping"]
    return sorted(name for name in names if "backbone" not in name and "head" not in name)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` block of a checkpoint's config, as one builds the stock model from.

    Wrappers become the stock model inside, graphs are made on the fly, and ``scale_file``, a path
    on the machine that trained it, goes: the state_dict holds the factors.
    """
    model = stock_model_config(modern_config(config)["model"])
    model.pop("scale_file", None)
    model["otf_graph"] = True
    if isinstance(model.get("backbone"), dict):
        model["backbone"].pop("scale_file", None)
        model["backbone"]["otf_graph"] = True
        # where it began: another file, whose parts this one's own weights have replaced
        model.pop("finetune_config", None)
    return model


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], name: str) -> None:
    """Load the weights of a checkpoint in today's layout into the bare ``model``: EMA's if any.

    Raises:
        UserError: they do not fit.
    """
    state = checkpoint["state_dict"]
    try:
        load_state_dict(model, state, strict=True)
        scales = checkpoint.get("scale_dict") or _scales_on_disk(model, checkpoint["config"])
        if scales:
            load_scales_compat(model, {k: v for k, v in scales.items() if k != "comment"})
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"The weights in {name} do not fit the model of its own config "
            f"({' '.join(lines)[:300]}); it was written by another version of fairchem-core or of "
            "the model."
        ) from error
    ema = checkpoint.get("ema")
    if not ema:
        return
    # fairchem's EMA keeps a list without names. Its order is that of the model that was trained,
    # which the names of its own weights tell; another release may have another.
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    averaged = [trained[key] for key in state if key in trained]
    shadow = ema["shadow_params"]
    if [p.shape for p in averaged] != [s.shape for s in shadow]:
        raise UserError(
            f"The averaged (EMA) weights in {name} do not fit its model: it was trained with other "
            "parameters frozen; use its best_checkpoint.pt."
        )
    for parameter, value in zip(averaged, shadow, strict=True):
        parameter.copy_(value)


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model that diverged: it answers NaN, and whoever learns from it would too.

    Raises:
        UserError: naming the first weight that is not finite.
    """
    for key, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The weights in {name} are not finite ({key} has NaN or infinity): its training "
                "diverged, or the file is damaged; take an earlier checkpoint, or train it again "
                "with a lower learning rate (optim.lr_initial) or optim.clip_grad_norm."
            )


def _scales_on_disk(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of the config's ``scale_file``, if the weights have none and the file is here."""
    path = scale_file(config)
    factors = [module for module in model.modules() if isinstance(module, ScaleFactor)]
    if path is None or not Path(path).is_file() or all(factor.fitted for factor in factors):
        return {}
    try:
        if path.endswith(".json"):
            return read_json(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"its scale_file {path} cannot be read: {error}") from error


def read_units(
    checkpoint: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[dict[str, Normalizer], dict[str, LinearReferences]]:
    """A checkpoint's normalisers and element references, by output."""
    normalizers = {
        key: create_normalizer(state_dict=state).to(device)
        for key, state in modern(checkpoint)["normalizers"].items()
    }
    references = {
        key: create_element_references(state_dict=state).to(device)
        for key, state in (checkpoint.get("elementrefs") or {}).items()
    }
    return normalizers, references


def read_model_config(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """The `model` block of a config (.yml, .yaml; with its includes) or of a checkpoint.

    Raises:
        UserError: if the file is missing or unreadable, or has no such block.
    """
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise UserError(f"{path}: no such config; give a checkpoint or a YAML config")
        try:
            config, _, conflicts = load_config(path)
        except (ValueError, OSError, AttributeError) as error:
            raise UserError(f"{path}: this config cannot be read: {error}") from error
        if conflicts:
            raise UserError(f"{path}: its includes give a key twice: {', '.join(conflicts)}")
    else:
        from fairchem_kd.models.file import read_checkpoint

        config = modern_config(read_checkpoint(path, trust=trust)["config"])
    model = config.get("model")
    if not isinstance(model, dict) or "name" not in model:
        raise UserError(f"{path}: there is no model block with a name in it, so nothing to inspect")
    return model


def build(config: dict[str, Any], path: Path) -> nn.Module:
    """The model of a `model` block, untrained (its features do not depend on the weights).

    Raises:
        UserError: if fairchem does not know the model or refuses its options.
    """
    options = copy.deepcopy(config)
    options.pop("scale_file", None)  # may not be there, and changes nothing here
    name = options.pop("name")
    setup_imports()
    try:
        model_class = registry.get_model_class(name)
    except Exception as error:
        raise UserError(f"{path}: fairchem has no model '{name}' (key model.name)") from error
    try:
        with warnings.catch_warnings():  # PaiNN calls what newer torch_geometric calls a no-op
            warnings.filterwarnings("ignore", "'PaiNNMessage.jittable' is deprecated")
            return model_class(**options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: model '{name}' cannot be built: {error}") from error
