"""``fairchem-kd sweep``: expand, run, status and collect."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_kd.commands.arguments import add_cluster_arguments, at_least
from fairchem_kd.errors import UserError

if TYPE_CHECKING:
    from fairchem_kd.sweep.manifest import Manifest, Run
    from fairchem_kd.sweep.state import Status

_EPILOG = """\
fairchem-kd sweep expand yaml_configs/sweeps/e2n_coefficient.yml --dry-run
fairchem-kd sweep run yaml_configs/sweeps/e2n_coefficient.yml --workers 8
fairchem-kd sweep run yaml_configs/sweeps/e2n_coefficient.yml --submit --slurm-partition gpu
fairchem-kd sweep status yaml_configs/sweeps/e2n_coefficient.yml
fairchem-kd sweep collect yaml_configs/sweeps/e2n_coefficient.yml

`run` again runs what is missing or failed, and goes on with what was interrupted.
docs/sweeps.md describes the YAML."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fairchem-kd sweep``."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str, sweep_help: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=help, description=help)
        made.add_argument("sweep", type=Path, metavar="SWEEP", help=sweep_help)
        made.add_argument(
            "--out", type=Path, metavar="FOLDER", help="its folder (default: runs/sweeps/<name>)"
        )
        return made

    either = "the sweep's YAML, or its folder"
    for name, text, sweep_help in (
        ("expand", "write one explicit config per run, and the manifest", "the sweep's YAML"),
        ("run", "expand, then run what is missing or failed, here or on SLURM", either),
    ):
        made = action(name, text, sweep_help)
        made.add_argument(
            "--config-yml", type=Path, help="the base config, in place of the sweep's own"
        )
        made.add_argument("--dry-run", action="store_true", help="print the table and do nothing")
        if name == "run":
            _add_run_arguments(made)
    action("status", "say how far each run has come, and why it is not done", either)
    made = action("collect", "write the table of metrics over seeds, and a plot", either)
    made.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="of the validation (default: every one)"
    )
    made.add_argument(
        "--at",
        choices=("best", "last"),
        default="best",
        help="the validation where the primary metric was best (default), or the last one",
    )
    made.add_argument(
        "--partial", action="store_true", help="count runs that are not done as far as they are"
    )
    made.add_argument("--no-plot", action="store_true", help="tables only")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-gpus", type=at_least(1), default=1, help="GPUs (or ranks) of each run"
    )
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    parser.add_argument(
        "--print-every", type=at_least(1), default=10, help="steps between a run's log lines"
    )
    here = parser.add_argument_group("on this machine")
    here.add_argument(
        "--workers", type=at_least(1), help="runs at a time (default: as the GPUs allow, else 1)"
    )
    here.add_argument(
        "--threads", type=at_least(1), help="of each rank (default: the cores, shared out)"
    )
    cluster = add_cluster_arguments(parser, "submit the runs as one job array")
    cluster.add_argument("--num-nodes", type=at_least(1), default=1, help="nodes of each run")


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says; returns 1 where runs failed."""
    return _ACTIONS[args.action](args)


def _expand(args: argparse.Namespace) -> int:
    from fairchem_kd.sweep.manifest import expand
    from fairchem_kd.sweep.state import statuses

    manifest = expand(args.sweep, args.out, args.config_yml, write=not args.dry_run)
    _print_table(manifest.listed, statuses(manifest))
    if not args.dry_run:
        print(f"\n{len(manifest.listed)} configs in {_shown(manifest.folder / 'configs')}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from fairchem_kd.sweep.manifest import expand, read_manifest
    from fairchem_kd.sweep.state import statuses

    if args.sweep.is_dir():
        if args.config_yml:
            raise UserError("--config-yml goes with the sweep's YAML, not with its folder.")
        manifest = read_manifest(args.sweep)
    else:
        manifest = expand(args.sweep, args.out, args.config_yml, write=not args.dry_run)
    found = statuses(manifest)
    if args.dry_run:
        _print_table(manifest.listed, found)
        return 0
    todo = [run for run in manifest.listed if _is_to_run(found[run.name])]
    print(f"{manifest.folder}: {_counts(manifest, found)}; {len(todo)} to run", flush=True)
    if not todo:
        return 0
    return (_submit if args.submit else _run_here)(args, manifest, todo)


def _is_to_run(status: Status) -> bool:
    """Failed, or waiting for nobody; a job in the queue is left alone."""
    from fairchem_kd.sweep.state import FAILED, PENDING

    return status.state == FAILED or (status.state == PENDING and status.job is None)


def _run_here(args: argparse.Namespace, manifest: Manifest, todo: Sequence[Run]) -> int:
    from fairchem_kd.sweep.local import Machine, run_locally

    machine = Machine(args.workers, args.threads, args.num_gpus, args.cpu)
    more = ["--print-every", str(args.print_every)]
    try:
        failed = run_locally(manifest, todo, machine, lambda line: print(line, flush=True), more)
    except KeyboardInterrupt:
        print("stopped; `run` again goes on from here")
        return 130
    print(f"{len(todo) - len(failed)} of {len(todo)} runs done", flush=True)
    return 1 if failed else 0


def _submit(args: argparse.Namespace, manifest: Manifest, todo: Sequence[Run]) -> int:
    from fairchem_kd.sweep.scheduler import has_slurm
    from fairchem_kd.sweep.submit import Request, submit

    request = Request(
        gpus=args.num_gpus,
        nodes=args.num_nodes,
        cpu=args.cpu or not (has_slurm() or _has_gpu()),
        parallel=args.array_parallelism,
        partition=args.slurm_partition,
        account=args.slurm_account,
        qos=args.slurm_qos,
        memory=args.slurm_mem,
        hours=args.slurm_timeout,
        print_every=args.print_every,
    )
    failed = submit(manifest, todo, request, lambda line: print(line, flush=True))
    for run in failed:
        print(f"{run.name} FAILED: see `fairchem-kd sweep status {_shown(manifest.folder)}`")
    return 1 if failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _status(args: argparse.Namespace) -> int:
    from fairchem_kd.sweep.state import statuses

    manifest = _manifest(args)
    found = statuses(manifest)
    _print_table(manifest.listed, found)
    print(f"\n{_counts(manifest, found)}")
    gone = [run for run in manifest.runs if not run.listed]
    if gone:
        print(f"{len(gone)} more are kept that the sweep has no longer: {_names(gone)}")
    return 0


def _collect(args: argparse.Namespace) -> int:
    from fairchem_kd.sweep.collect import as_markdown, choose_metrics, collect, write_tables
    from fairchem_kd.sweep.state import statuses

    manifest = _manifest(args)
    rows = collect(manifest, statuses(manifest), args.at, partial=args.partial)
    metrics = choose_metrics(rows, args.metrics)
    title = Path(manifest.sweep).stem
    written = write_tables(manifest.folder, rows, metrics, title, args.at)
    print(as_markdown(rows, metrics, title, args.at))
    if not args.no_plot:
        from fairchem_kd.sweep.plot import plot

        written.append(plot(manifest.folder / "results.png", rows, metrics, title))
    print("\n".join(f"written: {_shown(path)}" for path in written))
    return 0


_ACTIONS = {"expand": _expand, "run": _run, "status": _status, "collect": _collect}


def _manifest(args: argparse.Namespace) -> Manifest:
    from fairchem_kd.sweep.manifest import default_folder, read_manifest

    target: Path = args.sweep
    return read_manifest(target if target.is_dir() else args.out or default_folder(target))


def _print_table(runs: Sequence[Run], found: Mapping[str, Status]) -> None:
    from fairchem_kd.sweep.columns import columns

    heads, cells = columns(runs)
    rows = [["run", *heads, "seed", "state"]]
    for run, cell in zip(runs, cells, strict=True):
        status = found[run.name]
        told = f"{status.state}: {status.reason}" if status.reason else status.state
        rows.append([run.name, *cell, str(run.seed), told])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *cells_, told in rows:
        cut = [cell.ljust(width) for cell, width in zip(cells_, widths, strict=True)]
        print("  ".join([*cut, told]))


def _counts(manifest: Manifest, found: Mapping[str, Status]) -> str:
    from fairchem_kd.sweep.state import STATES

    counts = Counter(found[run.name].state for run in manifest.listed)
    return ", ".join(f"{counts[state]} {state}" for state in STATES)


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _shown(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
