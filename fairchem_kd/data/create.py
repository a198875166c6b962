"""Creating a data set once, whoever asks for it, and never leaving half of one behind."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from fairchem_kd._version import __version__
from fairchem_kd.data.card import (
    FORMAT,
    fit_references,
    read_card,
    referenced,
    statistics,
    versions,
    write_card,
)
from fairchem_kd.data.frames import Trajectory
from fairchem_kd.data.recipes.registry import Options
from fairchem_kd.data.replace import check_replaceable
from fairchem_kd.data.splits import QUARTERS, Split, collect, quarter_lengths
from fairchem_kd.data.workers import Progress, trajectories, worker_pool
from fairchem_kd.data.writer import BYTES_PER_ATOM, BYTES_PER_SAMPLE, write_split
from fairchem_kd.errors import UserError
from fairchem_kd.machine import available_cores


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold ``.<name>.lock`` beside ``root``; others wait. The kernel frees it when we die.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """
    lock = root.parent / f".{root.name}.lock"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"Cannot build the data set {root}: cannot write in {root.parent} ({error.strerror}); "
            "choose a folder that you may write to."
        ) from error
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"Waiting for another process that builds {root} (lock file {lock}).")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"Cannot build the data set {root}: the file system refuses to lock {lock} "
                f"({error.strerror}); choose a folder on another one."
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def default_processes() -> int:
    """As many as this process may use cores, at most 16."""
    return min(16, available_cores())


def _check_space(root: Path, options: Options) -> None:
    frames = sum(options.sizes.values()) + 1.5 * options.sizes["train"]
    need = int(frames * (BYTES_PER_SAMPLE + BYTES_PER_ATOM * options.recipe.atoms_per_frame))
    free = shutil.disk_usage(root.parent).free
    if free < need:
        raise UserError(
            f"Cannot build the data set {root}: it needs about {need / 1e6:.0f} MB and "
            f"{root.parent} has {free / 1e6:.0f} MB free; make room or choose another folder."
        )


def _generate(options: Options, processes: int, close: tuple[int, ...]) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    ahead = 4 * processes
    with worker_pool(processes, close) as pool:
        for number, (name, size) in enumerate(options.sizes.items()):
            make = partial(options.recipe.make(name), options.seed, number)
            progress = Progress(f"{options.recipe.name} {name}", size)

            def report(
                stream: Iterator[Trajectory], progress: Progress = progress
            ) -> Iterator[Trajectory]:
                for trajectory in stream:
                    progress.advance(len(trajectory.frames))
                    yield trajectory

            # A recipe that hardly ever gives a frame would go on for ever.
            most = 1000 + 20 * size
            try:
                splits[name] = collect(
                    name,
                    size,
                    number * 10**8,
                    islice(report(trajectories(pool, make, ahead)), most),
                )
            finally:
                progress.close()
            if len(splits[name]) < size:
                raise RuntimeError(
                    f"{name}: only {len(splits[name])} of {size} frames after {most} trajectories, "
                    f"skipped: {dict(splits[name].skipped)}"
                )
    return splits


def other_references(options: Options, root: Path) -> dict[int, float] | None:
    """The elements' energies of the data set that the options name, in eV; None where they do not.

    Raises:
        UserError: it is not there, of another recipe, or the one that is to be made.
    """
    if options.references is None:
        return None
    folder = Path(options.references)
    if Path(os.path.abspath(folder)) == root:
        raise UserError(
            f"references is {folder}, the data set that is to be made: name the one whose energies "
            "of the elements it is to have, or leave it out."
        )
    card = read_card(folder)
    recipe = options.recipe.name
    if card is None or (card.get("options") or {}).get("recipe") != recipe:
        raise UserError(
            f"references: {folder} is no data set of the recipe '{recipe}' (no card.json that says "
            f"so); make one with `fairchem-kd data {recipe}`, or leave references out."
        )
    try:
        found = {int(z): float(value) for z, value in card["reference_energies"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        found = {0: math.nan}
    if not all(map(math.isfinite, found.values())):
        raise UserError(
            f"references: the card of {folder} has no energies of the elements; make the data set "
            "again."
        )
    return found


def _write(
    folder: Path,
    options: Options,
    splits: dict[str, Split],
    references: dict[int, float] | None = None,
) -> dict[str, Any]:
    method = f"those of {options.references}, eV per atom"
    if references is None:
        references = fit_references(splits["train"])
        method = "least squares of the training set's total energies, eV per atom"
    present = {int(z) for split in splits.values() for frame in split.frames for z in frame.numbers}
    if options.references is not None and (unknown := sorted(present - references.keys())):
        raise UserError(
            f"references: {options.references} has no energies of the elements with the numbers "
            f"{', '.join(map(str, unknown))}, which this data set has; leave references out."
        )
    energies = {name: referenced(split, references) for name, split in splits.items()}
    for name, split in splits.items():
        write_split(folder / name, split, energies[name])
    quarters = quarter_lengths(splits["train"].sids)
    for quarter, length in quarters.items():
        write_split(folder / QUARTERS[quarter], splits["train"], energies["train"], length)
    recipe = options.recipe
    stats = {name: statistics(split, energies[name]) for name, split in splits.items()}
    card: dict[str, Any] = {
        "format": FORMAT,
        "options": options.as_dict(),
        "method": recipe.method,
        "note": recipe.note,
        "units": {"energy": "eV", "forces": "eV/Å", "positions": "Å", "cell": "Å"},
        "energy_definition": (
            "energy label = total energy - sum over atoms of reference_energies[element]; "
            "add them back for total energies"
        ),
        "reference_energies": {str(z): value for z, value in references.items()},
        "reference_method": method,
        "normalizer": {
            "energy": {"mean": stats["train"]["energy"]["mean"],
                       "rmsd": stats["train"]["energy"]["std"]},
            "forces": {"mean": 0.0, "rmsd": stats["train"]["force_rms_free"]},
        },
        "elements": sorted(references),
        "quarters": {
            QUARTERS[quarter]: {
                "frames": length,
                "trajectories": len(set(splits["train"].sids[:length])),
            }
            for quarter, length in quarters.items()
        },
        "splits": stats,
        "versions": {"fairchem-kd": __version__, **versions(*recipe.distributions)},
        **recipe.facts,
    }  # fmt: skip
    write_card(folder, card)
    return card


def create(
    options: Options, root: Path, processes: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Make the whole data set ``root`` and return its card; one that is there is left alone.

    It is made in a folder beside ``root`` and renamed when complete, under a lock file, so that any
    number of processes may ask at once and a killed build leaves no data set.

    Args:
        options: recipe, seed and sizes.
        root: the data set's folder; its splits become folders inside.
        processes: how many workers; the result does not depend on it.
        force: replace a data set that is already there; nothing else is ever deleted.

    Raises:
        UserError: no space, no right to write, a missing package, or another data set in the
            way; with ``force``, a folder that holds anything else.
    """
    root = Path(os.path.abspath(root))
    options.recipe.check()
    with locked(root) as descriptor:
        if root.exists() and not force:
            check_options(root, options)
            card = read_card(root)
            assert card is not None
            return card
        check_replaceable(root)
        references = other_references(options, root)
        for stale in root.parent.glob(f".{root.name}.building-*"):
            shutil.rmtree(stale, ignore_errors=True)  # of a build that was killed
        _check_space(root, options)
        _say(
            f"Building the data set {root}: recipe {options.recipe.name}, "
            f"{sum(options.sizes.values())} frames (once; it is kept)"
        )
        try:
            aside = Path(tempfile.mkdtemp(prefix=f".{root.name}.building-", dir=root.parent))
        except OSError as error:
            raise UserError(
                f"Cannot build the data set {root}: cannot write in {root.parent} "
                f"({error.strerror}); choose a folder that you may write to."
            ) from error
        try:
            aside.chmod(0o777 & ~_umask())
            splits = _generate(options, processes or default_processes(), (descriptor,))
            card = _write(aside, options, splits, references)
            check_replaceable(root)  # it took a while
            if root.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{root.name}.building-", dir=root.parent))
                root.rename(old / root.name)
            aside.rename(root)
            if force:
                for stale in root.parent.glob(f".{root.name}.building-*"):
                    shutil.rmtree(stale, ignore_errors=True)
        except BrokenProcessPool as error:
            raise UserError(
                f"Cannot build the data set {root}: a worker process was killed, perhaps for want "
                "of memory; try again with fewer processes."
            ) from error
        except (OSError, lmdb.Error) as error:
            raise UserError(
                f"Cannot write the data set {root}: {what_failed(error)}; make room or choose "
                "another folder."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return card


def what_failed(error: OSError | lmdb.Error) -> str:
    """Why a data set could not be written, in words."""
    full = isinstance(error, lmdb.DiskError) or getattr(error, "errno", 0) == errno.ENOSPC
    return "the disk is full" if full else str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_options(root: Path, options: Options, where: str = "") -> None:
    """Refuse a data set that was built with other options than these.

    Raises:
        UserError: no card, or one that says otherwise.
    """
    card = read_card(root)
    prefix = f"{where}: " if where else ""
    if card is None:
        raise UserError(
            f"{prefix}{root} exists but has no readable card.json, so it was not built by a "
            "recipe; remove it or name another folder."
        )
    built = card.get("options", {})
    wanted = {"references": None, **options.as_dict()}
    differs = [key for key in wanted if built.get(key) != wanted[key]]
    if differs:
        details = ", ".join(f"{key} {built.get(key)} instead of {wanted[key]}" for key in differs)
        raise UserError(
            f"{prefix}the data set {root} was built with {details}; change the "
            "options, name another folder, or remove it so that it is built again."
        )
