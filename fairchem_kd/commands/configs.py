"""``fairchem-kd configs``: the YAML configs that ship with the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fairchem_kd.errors import UserError


def shipped_configs() -> Path:
    """Return the folder of the shipped configs: inside an installed package, or of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "yaml_configs", package.parent / "yaml_configs"
    return installed if installed.is_dir() else checkout


def copy_configs(destination: Path, *, force: bool = False) -> list[Path]:
    """Copy the shipped configs to ``destination/yaml_configs`` and return the files written.

    Their includes name one another as ``yaml_configs/...``, so ``destination`` is the folder in
    which `fairchem` is then run. A file that is there already and is the same is left alone.

    Raises:
        UserError: a file there differs and ``force`` is not set, or nothing can be written there.
    """
    source = shipped_configs()
    pairs = [
        (path, destination / "yaml_configs" / path.relative_to(source))
        for path in sorted(source.rglob("*"))  # scale files too
        if path.is_file()
    ]
    pairs = [(a, b) for a, b in pairs if not (b.is_file() and b.read_bytes() == a.read_bytes())]
    changed = [b for _, b in pairs if b.exists()]
    if changed and not force:
        raise UserError(
            f"{changed[0]} exists and differs from the shipped config ({len(changed)} such files); "
            "copy to another folder, or overwrite them with --force."
        )
    try:
        for shipped, copy in pairs:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shipped, copy)
    except OSError as error:
        raise UserError(
            f"the configs cannot be written to {destination}: {error.strerror}."
        ) from error
    return [copy for _, copy in pairs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fairchem-kd configs``."""
    parser.add_argument(
        "--copy",
        metavar="DEST",
        type=Path,
        help="copy them to DEST/yaml_configs; without it, list them",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")


def run(args: argparse.Namespace) -> int:
    """List or copy the shipped configs."""
    if args.copy is None:
        root = shipped_configs()
        print(f"# in {root}")
        for path in sorted(root.rglob("*.yml")):
            print(Path("yaml_configs") / path.relative_to(root))
        return 0
    written = copy_configs(args.copy, force=args.force)
    print(f"{len(written)} files written to {args.copy / 'yaml_configs'}")
    return 0
