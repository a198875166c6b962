"""``fairchem-kd inspect``: the features that a model offers."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_config, setup_imports
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from torch import nn
from torch_geometric.data import Data

from fairchem_kd.errors import UserError
from fairchem_kd.features import wrappers  # noqa: F401  (registers the wrappers)
from fairchem_kd.features.architecture import Architecture, architecture_of
from fairchem_kd.legacy import modern_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", type=Path, help="a checkpoint (.pt), or a config with a model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="unpickle a checkpoint that cannot be read safely (this executes code in the file)",
    )


def run(args: argparse.Namespace) -> int:
    """Print what the model offers; returns the exit code."""
    config = read_model_config(args.model, trust=args.trust)
    report = {"source": str(args.model), **describe(build(config, args.model))}
    report["elements"] = read_elements(args.model)
    print(json.dumps(report, indent=2) if args.json else as_table(report))
    return 0


def read_model_config(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """The `model` block of a config (.yml, .yaml; with its includes) or of a checkpoint.

    Raises:
        UserError: if the file is missing or unreadable, or has no such block.
    """
    if path.suffix in (".yml", ".yaml"):
        if not path.is_file():
            raise UserError(f"{path}: no such config; give a checkpoint or a YAML config")
        try:
            if not isinstance(yaml.safe_load(path.read_text()), dict):
                raise ValueError("it is not a mapping of keys")
            config, _, conflicts = load_config(str(path))
        except (yaml.YAMLError, ValueError, OSError, AttributeError) as error:
            raise UserError(f"{path}: this config cannot be read: {error}") from error
        if conflicts:
            raise UserError(f"{path}: its includes give a key twice: {', '.join(conflicts)}")
    else:
        from fairchem_kd.checkpoint import read_checkpoint

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


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``model`` offers: every feature with kind, shape, channels and firings per forward.

    The model is run once, on a small structure. Switches ``use_pbc`` on, so that graphs can be
    made without torch_cluster: pass a model that is not needed afterwards.
    """
    architecture = architecture_of(model)
    firings = count_firings(architecture)
    backbone = architecture.backbone
    features = [
        {
            "address": address,
            "kind": spec.kind,
            "shape": spec.shape,
            "channels": spec.channels,
            "fires": firings[architecture.aliases.get(address, address)],
            "description": spec.description,
        }
        for address, spec in architecture.specs().items()
    ]
    return {
        "model": type(model).__name__,
        "backbone": type(backbone).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cutoff": backbone.cutoff,
        "max_neighbors": backbone.max_neighbors,
        "forces": _forces(backbone),
        "embedded_elements": architecture.num_elements,
        "features": features,
    }


def _forces(backbone: Any) -> str:
    if not backbone.regress_forces:
        return "none"
    return "direct" if getattr(backbone, "direct_forces", False) else "gradient"


def count_firings(architecture: Architecture) -> dict[str, int]:
    """How often each tap fires in one forward on a small structure."""
    counts = dict.fromkeys(architecture.taps, 0)

    def counter(address: str) -> Any:
        def count(_values: Any) -> None:
            counts[address] += 1

        return count

    root, backbone = architecture.root, architecture.backbone
    backbone.use_pbc = backbone.otf_graph = True
    training = root.training
    with ExitStack() as stack:
        for address, tap in architecture.taps.items():
            stack.callback(tap.attach(counter(address)).remove)
        root.eval()
        root(_water(next(root.parameters()).device))
    root.train(training)
    return counts


def _water(device: torch.device) -> Data:
    """Two water molecules and a hydrogen molecule in a periodic box, as a fairchem batch."""
    positions = [
        [1.0, 1.0, 1.0],
        [1.9, 1.1, 1.2],
        [0.7, 1.9, 1.1],
        [3.2, 2.8, 1.6],
        [3.9, 3.3, 2.1],
        [2.6, 3.3, 1.0],
        [1.5, 3.7, 3.6],
        [1.6, 3.1, 4.0],
    ]
    numbers = [8, 1, 1, 8, 1, 1, 1, 1]
    sample = Data(
        pos=torch.tensor(positions, dtype=torch.float32),
        cell=5.5 * torch.eye(3, dtype=torch.float32)[None],
        atomic_numbers=torch.tensor(numbers, dtype=torch.float32),
        natoms=len(numbers),
        tags=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
        fixed=torch.zeros(len(numbers)),
        sid=0,
        fid=0,
    )
    return data_list_collater([sample], otf_graph=True).to(device)


def read_elements(path: Path) -> list[Any] | None:
    """The elements that the card beside a checkpoint names; None without a card."""
    card = path.with_suffix(".json")
    if path.suffix in (".yml", ".yaml") or not card.is_file():
        return None
    try:
        content = json.loads(card.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{card}: this card is not readable JSON: {error}") from error
    return content.get("elements") if isinstance(content, dict) else None


def as_table(report: dict[str, Any]) -> str:
    """The report for people."""
    model = report["model"]
    if report["backbone"] != model:
        model += f" ({report['backbone']})"
    elements = report["elements"]
    known = " ".join(map(str, elements)) if elements else "not recorded"
    lines = [
        f"{report['source']}: {model}, {report['parameters']:,} parameters",
        f"cutoff {report['cutoff']:g} Å, at most {report['max_neighbors']} neighbours, "
        f"forces: {report['forces']}",
        f"elements: {known} (the embedding has rows for 1 to {report['embedded_elements']})",
        "",
    ]
    rows = [("feature", "kind", "shape", "channels", "fires", "description")]
    rows += [
        (f["address"], f["kind"], f["shape"], str(f["channels"]), str(f["fires"]), f["description"])
        for f in report["features"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines += [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]
    lines += ["", "N atoms, E directed edges; join layers with +, for example node@1+2"]
    return "\n".join(lines)
