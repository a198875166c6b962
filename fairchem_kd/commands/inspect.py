"""`fairchem-kd inspect`: list the features that a model offers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


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
    from fairchem_kd.features.describe import describe
    from fairchem_kd.models.build import build, read_model_config
    from fairchem_kd.models.elements import read_elements

    config = read_model_config(args.model, trust=args.trust)
    report = {"source": str(args.model), **describe(build(config, args.model))}
    report["elements"] = read_elements(args.model)
    print(json.dumps(report, indent=2) if args.json else as_table(report))
    return 0


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
