"""``fairchem-kd export``: the best weights of a run as one small, portable, stock checkpoint.

No optimiser state, no EMA beside the weights, no absolute path, no SLURM account. Beside
``NAME.pt`` goes a card ``NAME.json``: what the model was trained on, with what, how good it is.
"""

from __future__ import annotations

import copy
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from fairchem_kd._version import __version__
from fairchem_kd.errors import UserError
from fairchem_kd.features import stock_model_config
from fairchem_kd.features.facts import facts
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.reading import read_json
from fairchem_kd.stock.gradient_forces import has_gradient_forces
from fairchem_kd.stock.trainer import StockTrainer, in_one_process

CARD_FORMAT = 1
_METRICS = {
    "metrics": {"energy": ["mae"], "forces": ["mae", "cosine_similarity"]},
    "primary_metric": "forces_mae",
}


def portable(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A stock checkpoint with the weights of ``model``: plain values, no path of this machine.

    Args:
        checkpoint: where ``model`` came from.
        model: the bare model with the weights to ship.
    """
    config = copy.deepcopy(dict(checkpoint["config"]))
    roots = [Path.cwd(), *_run_dirs(config)]
    config = _plain(config, roots)
    config["model"] = stock_model_config(config["model"])
    for block in (config["model"], config["model"].get("backbone")):
        if isinstance(block, dict):
            block.pop("scale_file", None)  # the factors are among the weights
    config["slurm"] = {}
    if isinstance(config.get("logger"), dict):  # names of projects and people
        config["logger"] = config["logger"].get("name", "tensorboard")
    # Not cloned: modules that share weights stay so in the file.
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return {
        "state_dict": state,
        "normalizers": _plain(checkpoint.get("normalizers") or {}, roots),
        "elementrefs": _plain(checkpoint.get("elementrefs") or {}, roots),
        "config": config,
        "val_metrics": _plain(checkpoint.get("val_metrics"), roots),
        "amp": None,
    }


def _run_dirs(config: Mapping[str, Any]) -> list[Path]:
    """The run's folder, out of the ``cmd.*_dir`` that fairchem made from it."""
    folder = config.get("cmd", {}).get("checkpoint_dir")
    return [Path(folder).parent.parent] if folder else []


def _plain(value: Any, roots: list[Path]) -> Any:
    """A copy of only dicts, lists, tensors, numbers and strings, with relative paths."""
    if isinstance(value, Mapping):
        return {key: _plain(child, roots) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child, roots) for child in value]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (str, PurePath)):
        return _relative(str(value), roots)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if hasattr(value, "item"):  # a numpy scalar, in a file that was trusted
        return value.item()
    return str(value)


def _relative(text: str, roots: list[Path]) -> str:
    """``text``, made relative to the first root that holds it if it is an absolute path.

    Outside every root only the last two parts stay, which name the data set.
    """
    path = Path(text)
    if PureWindowsPath(text).drive and PureWindowsPath(text).is_absolute():
        return "/".join(PureWindowsPath(text).parts[-2:])
    if not path.is_absolute() or "\n" in text:
        return text
    for root in roots:
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return "/".join(path.parts[1:][-2:])


def evaluate(checkpoint: Path, data: Path) -> dict[str, dict[str, float]]:
    """Errors by stock evaluation on each of the splits val, test and test_ood that ``data`` has.

    Returns:
        By split: ``energy_mae`` in eV, ``forces_mae`` in eV/Å over free atoms where the config
        evaluates on those.
    """
    contents = read_checkpoint(checkpoint)
    config = contents["config"]
    train = config.get("dataset") or {}
    # how its own data were read, so that labels are found where training found them
    known = ("format", "key_mapping", "a2g_args", "pattern", "ase_read_args")
    reading = {key: train[key] for key in known if key in train}
    metrics = {}
    for split in ("val", "test", "test_ood"):
        if not (data / split).exists():
            continue
        trainer = in_one_process(
            StockTrainer,
            config,
            {"train": {}, "val": {"format": "lmdb", **reading, "src": str(data / split)}},
            identifier="export",
            evaluation_metrics=_METRICS,
        )
        trainer.load_checkpoint(str(checkpoint), copy.deepcopy(contents), inference_only=True)
        found = trainer.validate(split="val", disable_tqdm=True)
        metrics[split] = {
            name: round(float(found[name]["metric"]), 6)
            for name in ("energy_mae", "forces_mae")
            if name in found
        }
    return metrics


def forces_in_words(model: nn.Module) -> str:
    """How a model makes its forces, for its card."""
    if has_gradient_forces(model):
        return (
            "-dE/dx, worked out of the energy by fairchem-kd (task.conservative); fairchem-core by "
            "itself gives the energy alone: OCPCalculator(..., only_output=['energy'])"
        )
    kinds = {"direct": "a head of their own", "gradient": "-dE/dx", "none": "none"}
    return kinds[facts(model)["forces"]]


def training_seconds(config: Mapping[str, Any]) -> float | None:
    """Wall time that the run's TensorBoard files span, evaluations included; None without any."""
    folder = config.get("cmd", {}).get("logs_dir")
    spans = []
    for file in Path(folder).glob("events.out.tfevents.*") if folder else ():
        start = file.name.split(".")[3]
        if start.isdigit():
            spans.append(max(file.stat().st_mtime - int(start), 0.0))
    return round(sum(spans), 1) if spans else None


def data_card(folder: Path | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of the data set: in the folder that was given, or beside the training split."""
    if folder is None:
        source = (config.get("dataset") or {}).get("src")
        if not isinstance(source, str):
            return None
        folder = Path(source).parent
    elif not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; give the one that holds card.json.")
    card = folder / "card.json"
    if not card.is_file():
        return None
    try:
        return read_json(card)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The data card {card} cannot be read: {error}; take another copy of it, or name "
            "another folder with --data."
        ) from error


def _about(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the model's card takes over from the data's."""
    if data is None:
        return None
    kept: Iterable[str] = ("options", "method", "note", "energy_definition", "reference_energies")
    return {key: data[key] for key in kept if key in data}


def _commit() -> str | None:
    """The commit that is checked out where the command runs; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    names = ("fairchem-core", "torch", "torch-geometric", "numpy", "ase")
    return {
        "python": platform.python_version(),
        "fairchem-kd": __version__,
        **{name: version(name) for name in names},
    }
