"""What is worked around in fairchem-core 1.10, one function each, with the reason."""

from __future__ import annotations

import copy
import datetime
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fairchem.core import _cli
from fairchem.core.common import distutils
from fairchem.core.trainers import base_trainer
from submitit import AutoExecutor, JobEnvironment
from torch.distributed.launcher.api import LaunchConfig
from torch.utils.data import DataLoader, Subset, get_worker_info

from fairchem_kd.checkpoint import write_checkpoint
from fairchem_kd.errors import UserError
from fairchem_kd.resume import previous_of


def fresh_timestamp(
    run_dir: str, device: torch.device, suffix: str | None, *, claim: bool = True
) -> str:
    """A name for a new run that no other run has, the same on every rank.

    Stock's ``_get_timestamp`` sends the time through a float32 tensor: a granularity of 128 s, so
    that two runs with the same identifier share a folder and the second silently resumes the first.
    Here the first rank claims the folder by creating it (a debugging run makes no folders, and
    claims none), and tells its name to the others.
    """
    name = [""]
    if distutils.is_master():
        now = datetime.datetime.now()
        while True:
            name[0] = now.strftime("%Y-%m-%d-%H-%M-%S") + (f"-{suffix}" if suffix else "")
            if not claim:
                break
            try:
                os.makedirs(os.path.join(run_dir, "checkpoints", name[0]))
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    distutils.broadcast_object_list(name, src=0, device=device)
    return name[0]


@contextmanager
def checkpoints_written_with(extra: dict[str, Any]) -> Iterator[None]:
    """Within the block, stock's ``save`` writes ``extra`` into the file too, and writes it safely.

    ``BaseTrainer.save`` builds its dictionary and writes it in place: there is no hook for another
    key, and a crash while it writes leaves a truncated file. Its only way out is the function
    ``save_checkpoint`` of its module, which is replaced for the time of the call. Of a file from
    which a run goes on, one with ``extra``, the one before is kept.
    """

    def save_checkpoint(
        state: dict[str, Any], checkpoint_dir: str = "checkpoints/", checkpoint_file: str = ""
    ) -> str:
        path = os.path.join(checkpoint_dir, checkpoint_file)
        write_checkpoint({**state, **extra}, path, previous=previous_of(path) if extra else None)
        return path

    original = base_trainer.save_checkpoint
    base_trainer.save_checkpoint = save_checkpoint
    try:
        yield
    finally:
        base_trainer.save_checkpoint = original


def sweep_grid(base: dict[str, Any], sweep_yml: Path) -> list[dict[str, Any]]:
    """Every point of a sweep file, with each of its seeds, in a copy of the config ``base``.

    Stock's ``create_grid`` needs ``collections.MutableMapping``, gone since Python 3.10. This one
    reads the same files: nested keys (or dotted ones) whose leaves are lists of values; and those
    of `fairchem-kd sweep` (:mod:`fairchem_kd.sweep.spec`), whose base config it leaves to the
    command. Values are read as those of the command line are, so ``1e-4``, a string in YAML, is a
    number here.

    Raises:
        UserError: the file is missing, is no sweep, or has a key that no config has.
    """
    # Only a sweep needs it, and this module is imported by every training.
    from fairchem_kd.sweep.keys import with_values
    from fairchem_kd.sweep.spec import read_sweep

    sweep = read_sweep(sweep_yml, given_with="--sweep-yml")
    grid: list[dict[str, Any]] = []
    for point in sweep.points:
        config = with_values(base, point.values, str(sweep_yml))
        for seed in sweep.seeds if sweep.seeds is not None else [None]:
            one = copy.deepcopy(config)
            if seed is not None:
                one["seed"] = seed
            one["identifier"] = f"{base.get('identifier') or ''}_run{len(grid)}"
            grid.append(one)
    return grid


def own_port() -> None:
    """Have this process, the only rank of its run, listen on a port that nobody else can have.

    Stock's ``setup_env_local`` looks for a free one seconds before it is used, and frees it again;
    of several runs that start together two may find the same. Port 0 is chosen when it is used.
    """
    os.environ["MASTER_PORT"] = "0"


def join_submitted_ranks(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare this rank of a submitted job, and return the config with which it finds the others.

    For submitted jobs stock's ``distutils.setup`` knows nccl and GPUs alone, one port for all
    jobs of a node, and no scheduler but SLURM. Without ``submit`` it takes what torch's own
    launchers set, and the backend that the config names; that is set here from submitit's
    environment. Where ranks are on CPUs, each takes as many threads as the job has CPUs for it,
    or without a scheduler its share of those that PyTorch would take.

    Raises:
        UserError: the job is for GPUs, and there is none here.
    """
    job = JobEnvironment()
    devices = 0 if config["cpu"] else torch.cuda.device_count()
    if not (config["cpu"] or devices):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"rank {job.global_rank} sees no GPU on {job.hostname} (CUDA_VISIBLE_DEVICES is "
            f"{seen!r}), and the job was submitted for GPUs: submit it to a partition that has "
            "them, with a PyTorch for CUDA, or give --cpu."
        )
    address = "localhost" if job.num_nodes == 1 else job.hostnames[0]
    # One port for a job's ranks, which cannot agree on one before they have met.
    number = int("".join(filter(str.isdigit, job.raw_job_id)))
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(10000 + number % 20000),
        RANK=str(job.global_rank),
        # A cluster may show each rank its own GPU alone, which then is the first.
        LOCAL_RANK=str(0 if devices == 1 else job.local_rank),
        WORLD_SIZE=str(job.num_tasks),
    )
    if job.num_tasks == 1:
        own_port()
    if config["cpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # stock would give each rank one that it sees
        if "OMP_NUM_THREADS" not in os.environ:
            share = torch.get_num_threads() // (job.num_tasks // job.num_nodes)
            own = os.environ.get("SLURM_CPUS_PER_TASK") or share
            torch.set_num_threads(max(1, int(own)))
    return {**config, "submit": False, "world_size": job.num_tasks}


def launch_config(**stock: Any) -> LaunchConfig:
    """Elastic launch's config, for a run whose ranks meet at a place of their own.

    Stock names none, which means port 29400 of this machine: a second run joins the first one's
    store there, and dies when the first one ends.
    """
    return LaunchConfig(**{"rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex, **stock})


@contextmanager
def stock_command_with(
    *,
    config: dict[str, Any],
    runner: type,
    rank: Callable[[dict[str, Any]], None],
    executor: Callable[..., AutoExecutor],
) -> Iterator[None]:
    """Within the block, stock's ``_cli.main`` takes this config, Runner, rank function, executor.

    It builds its config inside and launches functions of its own module: there is no hook for data
    to be built first, for a plugin in launched processes, or for an error without a traceback. The
    Runner and the rank function must be importable, since launched processes and SLURM jobs
    unpickle them.
    """
    replacements = {
        "build_config": lambda args, overrides: config,
        "create_grid": sweep_grid,
        "Runner": runner,
        "runner_wrapper": rank,
        "AutoExecutor": executor,
        "LaunchConfig": launch_config,
    }
    originals = {name: getattr(_cli, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(_cli, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(_cli, name, original)


def in_file_order(settings: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A data set's config with which ``create_dataset`` keeps the order of its files.

    It shuffles unless it is told ``no_shuffle``, which it takes for a contradiction to ``first_n``
    and ``sample_n``. The first of these keeps the order by itself, the other one is a shuffle.

    Args:
        settings: the config.
        split: whose ``splits`` of the config count.
    """
    chosen = dict(settings)
    chosen |= (chosen.pop("splits", None) or {}).get(split) or {}
    if chosen.get("first_n") is None and chosen.get("sample_n") is None:
        chosen.setdefault("no_shuffle", True)
    return chosen


def with_own_databases(
    loader: DataLoader, start_worker: Callable[[int], None] | None = None
) -> DataLoader:
    """``loader`` with workers that open the ASE databases in LMDB (``.aselmdb``) for themselves.

    A worker is forked with its parent's databases open. ase-db-backends then opens them again,
    which newer lmdb refuses: the environment is already open in this process. So each worker closes
    its copies first; the parent's stay open.

    Args:
        start_worker: what else a worker does at its start.
    """
    loader.worker_init_fn = partial(_start_worker, start_worker)
    return loader


def _start_worker(start_worker: Callable[[int], None] | None, worker_id: int) -> None:
    if start_worker is not None:
        start_worker(worker_id)
    worker = get_worker_info()
    dataset: Any = worker.dataset if worker is not None else None
    while isinstance(dataset, Subset):  # fairchem's, and ours of unlabelled structures
        dataset = dataset.dataset
    for database in getattr(dataset, "dbs", []):
        if getattr(database, "_env", None) is not None:
            database._env.close()
            database._env = None


def with_primary_metric(given: dict[str, Any] | None, outputs: Iterable[str]) -> dict[str, Any]:
    """``evaluation_metrics`` with a primary metric: where none is given, an MAE, of forces first.

    Stock's ``update_best`` fails without one (``"mae" in None``). Where a config names ``trainer:
    forces`` or ``energy``, stock has defaults, but those go with these names.
    """
    chosen = dict(given or {})
    chosen["metrics"] = chosen.get("metrics") or {name: ["mae"] for name in outputs}
    if not chosen.get("primary_metric"):
        measured = [name for name, metrics in chosen["metrics"].items() if "mae" in metrics]
        if measured:
            name = "forces" if "forces" in measured else measured[0]
            chosen["primary_metric"] = f"{name}_mae"
    return chosen
