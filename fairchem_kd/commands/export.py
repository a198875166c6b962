"""`fairchem-kd export`: make a small, portable checkpoint, or a module, of a run's best."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from fairchem_kd.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd export``."""
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder, or its best_checkpoint.pt or checkpoint.pt"
    )
    parser.add_argument(
        "dest",
        type=Path,
        nargs="?",
        help="file to write, NAME.pt; its card is NAME.json (with --module it may be left out)",
    )
    parser.add_argument(
        "--module",
        type=Path,
        metavar="FILE",
        help="write NAME.pt2 too, which needs torch alone, and beside it its loader",
    )
    parser.add_argument("--data", type=Path, help="its dataset's folder: card.json, val, test, ...")
    parser.add_argument(
        "--elements", nargs="+", metavar="X", help="elements of the training data (H C 29 ...)"
    )
    parser.add_argument("--no-metrics", action="store_true", help="do not evaluate it on --data")
    parser.add_argument("--trust", action="store_true", help="unpickle a file that may run code")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(args: argparse.Namespace) -> int:
    """Export, evaluate and write the card; returns the exit code.

    Raises:
        UserError: the checkpoint cannot be exported, or a file cannot be written.
    """
    if args.dest is None and args.module is None:
        raise UserError("There is nothing to write: give DEST (NAME.pt), or --module NAME.pt2.")
    if args.dest is not None and args.dest.suffix != ".pt":
        raise UserError(f"DEST has to end in .pt, and {args.dest} does not.")
    from fairchem_kd.models.module_file import SUFFIX

    if args.module is not None:
        if args.module.suffix != SUFFIX:
            raise UserError(f"--module has to end in {SUFFIX}, and {args.module} does not.")
        if args.module.exists() and not args.force:
            raise UserError(f"{args.module} exists; give --force to overwrite it.")
    from fairchem_kd.analysis.subjects.runs import find_checkpoint

    args.checkpoint = find_checkpoint(args.checkpoint)
    if args.dest is not None:
        _export(args)
    if args.module is not None:
        _export_module(args)
    return 0


def _export_module(args: argparse.Namespace) -> None:
    """Write the network by itself, and the file that loads it."""
    from fairchem_kd.files import write_text
    from fairchem_kd.md.standalone import LOADER, loader
    from fairchem_kd.models.build import build_model, check_finite, read_units
    from fairchem_kd.models.elements import known_elements
    from fairchem_kd.models.file import read_checkpoint
    from fairchem_kd.models.legacy import modern
    from fairchem_kd.models.module import about, network_of, write_module
    from fairchem_kd.models.units import Units

    path = args.checkpoint
    checkpoint = modern(read_checkpoint(path, trust=args.trust), str(path))
    model = build_model(checkpoint, str(path))
    check_finite(model, str(path))
    network = network_of(model, str(path))
    numbers = known_elements(path, None)
    if named := _named_elements(args, checkpoint["config"]):
        numbers = frozenset(named)
    if numbers is None:
        logging.warning(
            f"{args.module} will not say which elements the model knows, so that it answers about "
            "others too: give --elements, or --data with a card.json that has them."
        )
    told = about(
        model, Units(*read_units(checkpoint, "cpu")), numbers, checkpoint["config"]["outputs"]
    )
    write_module(network, told, args.module)
    beside = args.module.with_name(LOADER)
    write_text(beside, loader())
    print(
        f"wrote {args.module} ({args.module.stat().st_size / 1e6:.1f} MB) and its loader {beside}: "
        f"from {beside.stem} import ModuleCalculator"
    )


def _named_elements(args: argparse.Namespace, config: dict[str, Any]) -> list[int]:
    """Atomic numbers of the training data, by ``--elements`` or the data's card; or none."""
    from fairchem_kd.models.elements import as_atomic_numbers
    from fairchem_kd.models.export import data_card

    if args.elements:
        return sorted(set(as_atomic_numbers(args.elements, "--elements")))
    named = (data_card(args.data, config) or {}).get("elements")
    where = "elements of the data's card"
    return [] if named is None else sorted(set(as_atomic_numbers(named, where)))


def _export(args: argparse.Namespace) -> None:
    """Write a checkpoint and its card."""
    dest, card = args.dest, args.dest.with_suffix(".json")
    from fairchem_kd.digest import sha256_of
    from fairchem_kd.models.card import DIGEST, is_left_over

    if not args.force and (dest.exists() or (card.exists() and not is_left_over(card, dest))):
        raise UserError(f"{dest} or its card {card.name} exists; give --force to overwrite them.")
    from ase.data import chemical_symbols

    from fairchem_kd.files import plain, write_json
    from fairchem_kd.models.build import build_model, check_finite
    from fairchem_kd.models.export import (
        CARD_FORMAT,
        _about,
        _commit,
        _versions,
        data_card,
        evaluate,
        forces_in_words,
        portable,
        training_seconds,
    )
    from fairchem_kd.models.file import read_checkpoint, write_checkpoint
    from fairchem_kd.models.legacy import modern
    from fairchem_kd.stock.scales import are_fitted

    checkpoint = modern(read_checkpoint(args.checkpoint, trust=args.trust), str(args.checkpoint))
    data = data_card(args.data, checkpoint["config"])
    elements = [chemical_symbols[z] for z in _named_elements(args, checkpoint["config"])] or None
    if elements is None:
        logging.warning(
            "The card will not say which elements the model knows: give --elements, or --data with "
            "a card.json that has them."
        )

    model = build_model(checkpoint, str(args.checkpoint))
    check_finite(model, str(args.checkpoint))
    if not are_fitted(model):
        logging.warning(
            f"{args.checkpoint} was trained without scale factors: it is exported as it is, but "
            "cannot be a teacher (see `fairchem-kd fit-scales`)."
        )
    exported = portable(checkpoint, model)
    contents = {
        "format": CARD_FORMAT,
        "checkpoint": dest.name,
        DIGEST: "",
        "model": exported["config"]["model"]["name"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "elements": elements,
        "units": {"energy": "eV", "forces": "eV/Å"},
        "forces": forces_in_words(model),
        "data": _about(data),
        "training_seconds": training_seconds(checkpoint["config"]),
        "metrics": {},
        "commit": _commit(),
        "versions": _versions(),
        "config": {k: v for k, v in exported["config"].items() if k not in ("cmd", "slurm")},
    }

    def complete(file: Path) -> None:
        """Write the card of the file, which only then gets its place."""
        if args.data is not None and not args.no_metrics:
            contents["metrics"] = evaluate(file, args.data)
        contents[DIGEST] = sha256_of(file)
        write_json(card, plain(contents))

    write_checkpoint(exported, dest, before=complete)
    for split, values in contents["metrics"].items():
        shown = ", ".join(f"{name} {1000 * value:.1f}" for name, value in values.items())
        print(f"{split}: {shown} (meV, meV/Å)")
    print(f"wrote {dest} ({dest.stat().st_size / 1e6:.1f} MB) and {card}")
