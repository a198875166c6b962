"""Structures to run models on: an LMDB, or any file that ASE reads. Labels are not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.subjects.splits import splits_of_run
from fairchem_kd.data.build import check_dataset, ensure_built
from fairchem_kd.data.convert.sources import find_files
from fairchem_kd.data.xyz_file import SUFFIXES, check_xyz, frames_of
from fairchem_kd.errors import UserError
from fairchem_kd.stock.datasets import close_dataset, collate, open_in_order
from fairchem_kd.stock.periodicity import as_periodic, tags_of
from fairchem_kd.training.first_samples import not_finite

if TYPE_CHECKING:
    import ase
    from torch_geometric.data import Batch, Data

    from fairchem_kd.analysis.subjects.runs import ModelFile


@dataclass(frozen=True)
class Structures:
    """An open file of structures, read one batch at a time."""

    name: str
    path: str
    count: int | None  #: None where only reading to the end tells
    _read: Callable[[], Iterator[tuple[int, Data]]] = field(repr=False)

    def samples(self) -> Iterator[Data]:
        """One structure after the other, as fairchem's collater takes them.

        Raises:
            UserError: one that cannot be read, or whose positions or cell are not finite.
        """
        return (sample for _, sample in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Data]]:
        """The same, each with its place among all that there are, whatever the limit is.

        Raises:
            UserError: see :meth:`samples`.
        """
        for number, sample in self._read():
            for key in ("pos", "cell"):
                if problem := not_finite(key, getattr(sample, key)):
                    raise UserError(f"{self.path}: structure {number} {problem}.")
            yield number, sample

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches in the order of the file.

        Raises:
            UserError: the file holds no structure, or one that cannot be read.
        """
        samples = self.samples()
        empty = True
        while chunk := list(islice(samples, batch_size)):
            empty = False
            yield collate(chunk)
        if empty:
            raise UserError(f"{self.path} holds no structure; name a file that does.")


def data_of(file: ModelFile) -> dict[str, Any]:
    """The config of the first of the splits that a run is judged by.

    Raises:
        UserError: its config names none, or one that only the file can have meant.
    """
    found = list(splits_of_run(file.config).values())
    if not found:
        raise UserError(f"The config in {file.path} names no test set: give one with --data PATH.")
    file.check_data(found[0], f"give --data {found[0]['src']}")
    return found[0]


@contextmanager
def open_structures(
    source: str | Path | Mapping[str, Any],
    *,
    limit: int | None = None,
    name: str = "",
    labels: bool = False,
) -> Iterator[Structures]:
    """The structures of ``source``, as long as the block runs.

    Args:
        source: a folder of ``*.lmdb`` files, one such file, any other file that ASE reads, a
            folder of those, or a dataset's config (``{"format": "lmdb", "src": ...}``, whose
            ``build`` is honoured).
        limit: so many structures at most, evenly spread over all of them.
        name: what tables call it; by default the last part of its path.
        labels: read the labels of files that ASE reads too; those of LMDBs are there anyway.

    Raises:
        UserError: it is missing, empty, or nothing that can be read.
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.exists():
            raise UserError(f"{path} does not exist in {Path.cwd()}; name a file of structures.")
        if path.suffix != ".lmdb" and not (path.is_dir() and any(path.glob("*.lmdb"))):
            files = files_in(path)
            yield Structures(name or path.name, str(path), None, lambda: _ase(files, limit, labels))
            return
        source = {"format": "lmdb", "src": str(path)}
    dataset = _open_dataset(source)
    try:
        total = len(dataset)
        count = total if limit is None else min(limit, total)

        def read() -> Iterator[tuple[int, Data]]:
            return ((place, dataset[place]) for place in _spread(total, count))

        path = Path(source["src"])
        yield Structures(name or path.name, str(path), count, read)
    finally:
        close_dataset(dataset.dataset)


def _open_dataset(settings: Mapping[str, Any]) -> Any:
    path = settings["src"]
    if settings.get("build") is not None:
        ensure_built({"dataset": {"test": dict(settings)}})
    check_dataset(settings, "the structures")
    try:
        dataset = open_in_order(settings, "test")
    except Exception as error:  # whatever a dataset makes of a path that is not for it
        raise UserError(
            f"{path} cannot be read as format '{settings.get('format')}' "
            f"({type(error).__name__}: {error})."
        ) from error
    if len(dataset) == 0:
        raise UserError(f"{path} holds no structure; name a file that does.")
    return dataset


def files_in(path: Path) -> list[Path]:
    """The files that ASE reads in a folder, or the file itself.

    Raises:
        UserError: it has none.
    """
    try:
        return find_files([path])
    except UserError as error:
        raise UserError(
            f"The folder {path} has no *.lmdb file and no file that ASE is known to read (.extxyz, "
            ".traj, .db, ...); name the folder that has them, or a file."
        ) from error


def _ase(files: Sequence[Path], limit: int | None, labels: bool) -> Iterator[tuple[int, Data]]:
    """The structures of files that ASE reads, one after the other; with a limit read twice."""
    found: Iterable[tuple[int, ase.Atoms]]
    found = enumerate(atoms for file in files for atoms in _read(file))
    if limit is not None:
        places = set(_spread(sum(map(_frames, files)), limit))
        found = (one for one in found if one[0] in places)
    for number, atoms in found:
        sample = to_sample(atoms, number)
        if labels:
            _add_labels(sample, atoms)
        yield number, sample


def _spread(total: int, limit: int) -> list[int]:
    """At most so many places, evenly spread over all."""
    count = min(limit, total)
    return [number * total // count for number in range(count)]


def _frames(file: Path) -> int:
    """How many structures there are in it."""
    return sum(1 for _ in (frames_of(file) if file.suffix in SUFFIXES else _read(file)))


def _add_labels(sample: Data, atoms: ase.Atoms) -> None:
    """Energy, eV, and forces, eV/Å, ``(N, 3)``, of all atoms, where the file has them."""
    import torch

    results = getattr(atoms.calc, "results", None) or {}
    energy, forces = results.get("energy"), results.get("forces")
    if energy is not None and np.isfinite(energy):
        sample.energy = float(energy)
    if forces is not None and np.isfinite(forces).all():
        sample.forces = torch.tensor(np.asarray(forces), dtype=torch.float32)


def _read(file: Path) -> Iterator[ase.Atoms]:
    from ase.io import iread

    if file.suffix in SUFFIXES:
        check_xyz(file)
    try:
        yield from iread(file, index=":")
    except Exception as error:  # each of ASE's many readers fails in its own way
        raise UserError(
            f"{file} cannot be read by ASE ({type(error).__name__}: {error}); name an LMDB, or a "
            "file in a format of ase.io."
        ) from error


def to_sample(atoms: ase.Atoms, number: int = 0) -> Data:
    """The sample that fairchem's models take, ``sid`` being ``number``; see :func:`as_periodic`."""
    import torch
    from fairchem.core.preprocessing import AtomsToGraphs

    from fairchem_kd.stock.constraints import held

    convert = AtomsToGraphs(r_edges=False, r_fixed=True, r_pbc=True).convert
    data = convert(as_periodic(atoms), sid=number)
    data.fixed = torch.from_numpy(held(atoms)[0])
    if not data.tags.any():
        data.tags = torch.from_numpy(tags_of(len(atoms), bool(np.any(atoms.pbc))))
    data.fid = 0
    data.pbc = data.pbc.view(1, 3)
    return data
