"""Stock's data sets, with what is worked around in them: one function each, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Subset, get_worker_info

if TYPE_CHECKING:
    from torch_geometric.data import Batch


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


def collate(samples: Sequence[Any]) -> Batch:
    """A batch of samples without graphs, which models then make for themselves."""
    from fairchem_kd.stock import samples as ours

    return ours.collate(list(samples), otf_graph=True)


def open_in_order(settings: Mapping[str, Any], split: str) -> Any:
    """The data set of a config, in the order of its files (see :func:`in_file_order`)."""
    return open_dataset(in_file_order(settings, split), split)


def open_dataset(settings: Mapping[str, Any], split: str) -> Any:
    """The data set of a config, as a training would open it."""
    from fairchem.core.common.utils import setup_imports
    from fairchem.core.datasets.base_dataset import create_dataset

    from fairchem_kd.stock.constraints import use_our_rule

    setup_imports()
    use_our_rule()
    return create_dataset(dict(settings), split)


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


def close_dataset(dataset: Any) -> None:
    """Close an LMDB now, not when the last reference goes, so that it can be opened again."""
    opened = [*getattr(dataset, "envs", []), getattr(dataset, "env", None)]
    opened += [getattr(base, "_env", None) for base in getattr(dataset, "dbs", [])]  # aselmdb
    for environment in opened:
        if environment is not None:
            environment.close()
