"""A sweep's folder: one explicit config per run, and a manifest that says which runs there are.

    FOLDER/manifest.json          the runs, with a digest of the file's own contents
    FOLDER/configs/<name>.yml     a run's whole config, includes and overrides resolved
    FOLDER/status/<name>.json     how far it has come (state)
    FOLDER/output/<name>.log      what it printed
    FOLDER/checkpoints/<name>/    what fairchem writes: records.jsonl, checkpoint.pt, ...

A run's name is a hash of its resolved config, seed included: the same run has the same name in
every sweep and on every machine, and a changed base config makes new runs rather than mixed ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.files import write_text
from fairchem_kd.reading import read_json
from fairchem_kd.stock.configs import read_yaml
from fairchem_kd.sweep.manifest_contents import FLAGS, FORMAT, check_contents
from fairchem_kd.sweep.spec import Point, Sweep, read_sweep

MANIFEST = "manifest.json"
#: What the launching command sets in a config; none of it makes a run another run.
LAUNCH_KEYS = (
    "cpu",
    "distributed_backend",
    "gp_gpus",
    "identifier",
    "is_debug",
    "mode",
    "print_every",
    "run_dir",
    "submit",
    "summit",
    "timestamp_id",
    "world_size",
)


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    name: str
    values: dict[str, Any]  # what the sweep set, by dotted key
    seed: int
    label: str = ""  # the point's name in the sweep
    arguments: list[str] = field(default_factory=list)  # of the fairchem command
    listed: bool = True  # False: the sweep was edited and has this run no longer

    @property
    def point(self) -> str:
        """What runs that differ in the seed alone have in common, as text."""
        told = ", ".join(f"{key}={value}" for key, value in self.values.items())
        return self.label or told or "base config"


@dataclass(frozen=True)
class Manifest:
    """The runs of a sweep's folder; paths in configs start from ``directory``."""

    folder: Path
    sweep: str
    directory: str
    runs: list[Run]

    @property
    def listed(self) -> list[Run]:
        return [run for run in self.runs if run.listed]

    def config_path(self, run: Run) -> Path:
        return self.folder / "configs" / f"{run.name}.yml"

    def run_folder(self, run: Run) -> Path:
        """Where the run's checkpoints and records are."""
        return self.folder / "checkpoints" / run.name

    def output_path(self, run: Run) -> Path:
        return self.folder / "output" / f"{run.name}.log"

    def command(self, run: Run) -> list[str]:
        """The arguments of ``fairchem`` that train this run, or go on with it."""
        return [
            *("main", "--mode", "train", "--config-yml", str(self.config_path(run))),
            *("--run-dir", str(self.folder), "--identifier", run.name, "--timestamp-id", run.name),
            *run.arguments,
        ]


def default_folder(sweep_yml: Path) -> Path:
    return Path("runs") / "sweeps" / sweep_yml.stem


def run_name(config: Mapping[str, Any], arguments: list[str]) -> str:
    """Ten hexadecimal digits of a hash of the resolved config and what the command line adds.

    Numbers that are equal hash the same (1 and 1.0), as they mean the same; ``slurm`` says where a
    run happens, not what it is.
    """
    hashed = {key: value for key, value in config.items() if key != "slurm"}
    text = json.dumps([_canonical(hashed), arguments], sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(child) for child in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def read_base(path: Path, sweep: Path | None = None) -> dict[str, Any]:
    """The base config, its includes resolved.

    Raises:
        UserError: it is missing or cannot be used.
    """
    from fairchem_kd.launch.config import make_parser, read_config

    if sweep is not None and not path.is_file():
        folder = path.parent
        names = [str(p) for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise UserError(
            f"{sweep}: the base config {path} does not exist in {Path.cwd()}"
            f"{did_you_mean(str(path), names)}."
        )
    argv = ["--mode", "train", "--config-yml", str(path)]
    return read_config(make_parser().parse_args(argv), [])


def resolve(sweep: Sweep, base: Mapping[str, Any]) -> list[tuple[Run, dict[str, Any]]]:
    """Every run of a sweep with its explicit config.

    Raises:
        UserError: a key that no config has, one that is the command's to set, or two points that
            are the same run.
    """
    from fairchem_kd.sweep.keys import with_values

    where = str(sweep.path)
    found: dict[str, tuple[Run, dict[str, Any]]] = {}
    for point in sweep.points:
        _check_launch_keys(point, sweep)
        config = with_values(base, point.values, where)
        for seed in sweep.seeds or [config.get("seed") or 0]:
            run, explicit = _run_of(point, {**config, "seed": seed})
            if run.name in found:
                other = found[run.name][0]
                raise UserError(
                    f"{where}: the points '{other.point}' and '{run.point}' with seed {seed} are "
                    f"the same run (hash {run.name}); remove one of the two."
                )
            found[run.name] = run, explicit
    return list(found.values())


def _check_launch_keys(point: Point, sweep: Sweep) -> None:
    for key in point.values:
        if key in LAUNCH_KEYS:
            raise UserError(f"{sweep.path}: {key} is set by the command; it cannot be swept.")
        if key == "seed" and sweep.seeds:
            raise UserError(f"{sweep.path}: there are seeds, and seed is swept; give one of them.")


def _run_of(point: Point, config: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    try:
        seed = int(config["seed"])
    except (TypeError, ValueError):
        raise UserError(f"seed must be a whole number, not {config['seed']!r}.") from None
    arguments = []
    for key, flag in FLAGS.items():
        value = seed if key == "seed" else config.get(key)
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments += [flag, str(value)]
    explicit = {k: _as_yaml(v) for k, v in config.items() if k not in {*LAUNCH_KEYS, *FLAGS}}
    name = run_name(explicit, arguments)
    values = {key: _as_yaml(value) for key, value in point.values.items() if key != "seed"}
    return Run(name, values, seed, point.label, arguments), explicit


def _as_yaml(value: Any) -> Any:
    """Tuples, which the command line's literals may be, as lists."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(child) for key, child in value.items()}
    return [_as_yaml(child) for child in value] if isinstance(value, (list, tuple)) else value


def expand(
    sweep_yml: Path,
    folder: Path | None = None,
    config_yml: Path | None = None,
    *,
    write: bool = True,
) -> Manifest:
    """Resolve a sweep into its folder; what is there already stays.

    Runs that the sweep no longer has are kept, unlisted, where they have results.

    Args:
        config_yml: the base config in place of the sweep's own.
        write: False: a dry run, which writes nothing.

    Raises:
        UserError: a wrong sweep, base config or folder, a manifest or config edited by hand.
    """
    sweep = read_sweep(sweep_yml)
    base = config_yml or sweep.base
    if base is None:
        raise UserError(
            f"{sweep_yml} names no base config; add `base: CONFIG` to it, or give --config-yml."
        )
    folder = (folder or default_folder(sweep_yml)).absolute()
    resolved = resolve(sweep, read_base(base, sweep_yml if config_yml is None else None))
    runs = [run for run, _ in resolved]
    before = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if before is not None:
        _check_same_sweep(before, sweep_yml)
        names = {run.name for run in runs}
        gone = [run for run in before.runs if run.name not in names]
        runs += [replace(r, listed=False) for r in gone if before.run_folder(r).exists()]
    manifest = Manifest(folder, str(sweep_yml.absolute()), os.getcwd(), runs)
    if write:
        for run, config in resolved:
            _write_config(manifest, run, config)
        _write_manifest(manifest)
        for run in before.runs if before else ():
            if run not in runs and run.name not in {r.name for r in runs}:
                manifest.config_path(run).unlink(missing_ok=True)
    return manifest


def _check_same_sweep(before: Manifest, sweep_yml: Path) -> None:
    if Path(before.sweep).exists() and not Path(before.sweep).samefile(sweep_yml):
        raise UserError(
            f"{before.folder} holds the sweep {before.sweep}; give {sweep_yml} a folder of its own "
            "with --out."
        )
    if before.directory != os.getcwd():
        raise UserError(
            f"the sweep in {before.folder} was expanded in {before.directory}, where the paths in "
            "its configs start; go there, or give --out for a new folder."
        )


def _write_config(manifest: Manifest, run: Run, config: dict[str, Any]) -> None:
    path = manifest.config_path(run)
    if path.exists():
        check_config(manifest, run)
        return
    told = "".join(f"#   {key}: {value!r}\n" for key, value in run.values.items())
    head = f"# Run {run.name} of {Path(manifest.sweep).name}, written by fairchem-kd sweep.\n{told}"
    head += f"# By hand: fairchem {' '.join(manifest.command(run))}\n"
    text = head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_text(path, text)


def check_config(manifest: Manifest, run: Run) -> dict[str, Any]:
    """The config that a run's file holds.

    Raises:
        UserError: it is missing, or not the one that the run is named after.
    """
    path = manifest.config_path(run)
    mend = "remove it and expand the sweep again; changes belong into the sweep's YAML"
    try:
        config = read_yaml(path)
        named = run_name(config, run.arguments) if isinstance(config, dict) else ""
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expand the sweep again to have it written.") from None
    except (OSError, ValueError, TypeError) as error:  # TypeError: values that JSON has not
        raise UserError(f"{path} cannot be read ({error}); {mend}.") from error
    if named != run.name:
        raise UserError(f"{path} is not the config that its name stands for: {mend}.")
    return config


def _write_manifest(manifest: Manifest) -> None:
    contents: dict[str, Any] = {
        "format": FORMAT,
        "sweep": manifest.sweep,
        "directory": manifest.directory,
        "runs": [asdict(run) for run in manifest.runs],
    }
    contents["digest"] = _digest(contents)
    text = json.dumps(contents, indent=1) + "\n"
    write_text(manifest.folder / MANIFEST, text)


def _digest(contents: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in contents.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a sweep's folder.

    Raises:
        UserError: there is none, or it is not as `fairchem-kd sweep` wrote it.
    """
    path = folder / MANIFEST
    try:
        contents = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no sweep's folder: it has no {MANIFEST}; "
            "`fairchem-kd sweep expand SWEEP_YML` makes one."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; {_MEND}.") from error
    if contents.get("digest") != _digest(contents):
        raise UserError(f"{path} was edited by hand; {_MEND}.")
    found = contents.get("format")
    if type(found) is int and found > FORMAT:
        raise UserError(f"{path} was written by a newer fairchem-kd; upgrade fairchem-kd.")
    try:
        check_contents(contents)
    except ValueError as error:
        raise UserError(f"{path} is not what fairchem-kd sweep writes: {error}; {_MEND}.") from None
    runs = [Run(**run) for run in contents["runs"]]
    return Manifest(folder.absolute(), contents["sweep"], contents["directory"], runs)


_MEND = (
    "remove it and expand the sweep's YAML again (runs are known by their configs' hashes, so none "
    "is lost)"
)
