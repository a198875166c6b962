"""``fairchem-kd features``: a checkpoint's embeddings of any structures, to npz or parquet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fairchem_kd.commands.arguments import at_least

EPILOG = """\
MODEL is a checkpoint of any fairchem 1.x GemNet-OC, PaiNN, SchNet, EquiformerV2, eSCN or eSEN, or
the folder of a run; STRUCTURES an LMDB (a file or a folder of them) or any file that ASE reads.
Edge features are summed onto their target atoms. `fairchem-kd inspect MODEL` lists the addresses.

  fairchem-kd features model.pt structures.extxyz --out embeddings.npz
  fairchem-kd features model.pt data/slabs/val --feature node@2 --feature vector --out out.parquet
  fairchem-kd features model.pt molecules.traj --pool mean --out molecules.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fairchem-kd features``."""
    parser.description = "Write a model's node, edge or vector features of structures to a file."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("structures", type=Path, metavar="STRUCTURES")
    parser.add_argument("--out", type=Path, required=True, help="a file .npz or .parquet")
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="which, any number of times (default: node)",
    )
    parser.add_argument(
        "--pool", choices=("mean", "sum"), help="over the atoms: a row for each structure"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="so many structures at most")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="structures at a time (16)"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is CUDA")
    parser.add_argument("--trust", action="store_true", help="unpickle files that may run code")


def run(args: argparse.Namespace) -> int:
    """Extract and write; returns the exit code.

    Raises:
        UserError: a model, feature, file of structures or kind of output that will not do.
    """
    from fairchem_kd.analysis.embeddings.files import check_format, write_features

    check_format(args.out)
    from fairchem_kd.analysis.embeddings.extract import extract_features, feature_tap
    from fairchem_kd.analysis.subjects.runs import load_model, read_model
    from fairchem_kd.analysis.subjects.structures import open_structures
    from fairchem_kd.machine import choose_device

    model = load_model(read_model(args.model, trust=args.trust), choose_device(cpu=args.cpu))
    tap = feature_tap(model.model, args.feature or ["node"])
    about = {
        "format": 1,
        "checkpoint": model.name,
        "structures": str(args.structures),
        "pool": args.pool,
        "features": {
            request.address: {
                "form": request.form,
                "channels": spec.channels,
                "description": spec.description,
            }
            for request, spec in tap.specs.items()
        },
    }
    with open_structures(args.structures, limit=args.limit) as structures:
        chunks = extract_features(
            model, structures, tap, pool=args.pool, batch_size=args.batch_size, progress=True
        )
        path = write_features(chunks, args.out, about)
    rows = "(S," if args.pool else "(N,"  # edges are summed onto atoms
    shapes = [f"{one.address} {spec.shape.replace('(N,', rows)}" for one, spec in tap.specs.items()]
    print(f"wrote {path}: {', '.join(shapes)}", file=sys.stderr)
    return 0
