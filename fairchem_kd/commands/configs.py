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
    parser.add_argument(
        "--schema",
        metavar="FILE",
        type=Path,
        help="write the JSON schema of a config to FILE, for editors, and do nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """List or copy the shipped configs, or write the schema of one."""
    if args.schema is not None:
        return _write_schema(args.schema, force=args.force)
    if args.copy is None:
        root = shipped_configs()
        print(f"# in {root}")
        for path in sorted(root.rglob("*.yml")):
            print(Path("yaml_configs") / path.relative_to(root))
        return 0
    written = copy_configs(args.copy, force=args.force)
    print(f"{len(written)} files written to {args.copy / 'yaml_configs'}")
    return 0


def _write_schema(path: Path, *, force: bool) -> int:
    from fairchem_kd.distillation.json_schema import config_schema
    from fairchem_kd.files import write_json

    if path.exists() and not force:
        raise UserError(f"{path} exists; name another file, or overwrite it with --force.")
    try:
        write_json(path, config_schema())
    except OSError as error:
        raise UserError(f"the schema cannot be written to {path}: {error.strerror}.") from error
    print(f"{path}: name it in an editor, or at the head of a config by a line")
    print(f"# yaml-language-server: $schema={path}")
    return 0
