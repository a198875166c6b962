"""`fairchem-kd fit-scales`: fit the scale factors of GemNet-OC or PaiNN."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from fairchem_kd.commands.arguments import at_least
from fairchem_kd.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd fit-scales``."""
    parser.description = (
        "Fit the scale factors of the model in CONFIG on its training set and write them to a "
        "file that `model.scale_file` (of a hydra: `model.backbone.scale_file`) loads."
    )
    parser.add_argument("--config-yml", type=Path, required=True, help="a training config")
    parser.add_argument(
        "--num-batches", type=at_least(1), default=8, help="batches to measure on (8)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write, .json or .pt (default: the config's own scale_file)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")


def run(args: argparse.Namespace) -> int:
    """Fit and write; returns the exit code.

    Raises:
        UserError: no config, no data, no scale factors in the model, or nowhere to write.
    """
    from fairchem_kd.stock.configs import training_config
    from fairchem_kd.stock.scales import scale_file_key, scale_file_of

    config = training_config(args.config_yml)
    model_config = dict(config.get("model") or {})
    if "name" not in model_config:
        raise UserError(f"{args.config_yml} has no model.name, so there is nothing to fit.")
    key = scale_file_key(model_config)
    if key != "model.scale_file" and model_config.get("scale_file"):
        raise UserError(
            f"{args.config_yml}: a hydra does not know model.scale_file; move it to {key}."
        )
    out = args.out or scale_file_of(model_config)
    if not out or not isinstance(out, (str, Path)):
        raise UserError(
            f"{args.config_yml} names no {key}: say where to write with --out FILE.json."
        )
    out = Path(out)
    if out.suffix not in (".json", ".pt"):
        raise UserError(f"--out {out} must end in .json or .pt, the formats fairchem reads.")

    scales = fit(config, args.config_yml, batches=args.num_batches, seed=args.seed, cpu=args.cpu)
    write_scales(scales, out)
    logging.info(f"Wrote {len(scales)} scale factors to {out}; set {key} to use them.")
    return 0


def fit(
    config: dict[str, Any], path: Path, *, batches: int = 8, seed: int = 0, cpu: bool = False
) -> dict[str, float]:
    """The scale factors of the model in a config, by name, fitted on its training set.

    Args:
        config: for a training.
        path: its file, for errors.
        batches: to measure on.
        seed: of weights and batches.
        cpu: use the CPU even where there is CUDA.

    Raises:
        UserError: no data, or no scale factors in the model.
    """
    from fairchem_kd.data.build import ensure_built
    from fairchem_kd.stock.scales import fit_scale_factors, trainer_for_scales

    ensure_built(config)  # says which path is missing
    trainer = trainer_for_scales(config, path, seed=seed, cpu=cpu)
    assert trainer.train_loader is not None
    given = (batch.to(trainer.device) for batch in trainer.train_loader)
    return fit_scale_factors(trainer.model, given, num_batches=batches)


def write_scales(scales: dict[str, float], path: Path) -> None:
    """To a ``.json`` or ``.pt`` that fairchem reads."""
    import torch

    from fairchem_kd.files import write_text, write_whole

    if path.suffix == ".json":
        text = json.dumps(scales, indent=2) + "\n"
        write_text(path, text)
    else:
        tensors = {name: torch.tensor(value) for name, value in scales.items()}
        write_whole(path, lambda file: torch.save(tensors, file))
