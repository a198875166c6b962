"""What a worker of a conversion leaves on disk: one LMDB per split, and what it counted."""

from __future__ import annotations

import pickle
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from ase.data import chemical_symbols
from torch_geometric.data import Data

from fairchem_kd.data.frames import Array
from fairchem_kd.stock import periodicity

_COMMIT_EVERY = 256  # samples
_MAX_Z = 119


class Shard:
    """An LMDB in fairchem's format that grows as samples come; `close` makes it complete."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._size = 2**24
        self._environment = lmdb.open(
            str(file), subdir=False, lock=False, meminit=False, map_async=True, map_size=self._size
        )
        self._waiting: list[tuple[bytes, bytes]] = []
        self.length = 0

    def add(self, sample: Data) -> None:
        key = str(self.length).encode("ascii")
        self._waiting.append((key, pickle.dumps(sample, protocol=4)))
        self.length += 1
        if len(self._waiting) == _COMMIT_EVERY:
            self._commit()

    def _commit(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._waiting:
                        transaction.put(key, value)
                self._waiting = []
                return
            except lmdb.MapFullError:
                self._size *= 2
                self._environment.set_mapsize(self._size)

    def close(self) -> None:
        self._waiting.append((b"length", pickle.dumps(self.length, protocol=4)))
        self._commit()
        self._environment.sync(True)
        self._environment.close()

    def abandon(self) -> None:
        """Close it as it is; it is made anew."""
        self._environment.close()


def _whole() -> array[int]:
    return array("q")


def _real() -> array[float]:
    return array("d")


@dataclass
class Tally:
    """What is known of the frames of one split after they have been written.

    Six numbers per frame, and sums. Those of element counts give the least-squares references of
    any number of parts at once: ``normal`` is A^T A and ``moment`` A^T b, where A has a row of
    element counts for each frame and b is the energy that references are to explain.
    """

    natoms: array[int] = field(default_factory=_whole)
    sid: array[int] = field(default_factory=_whole)
    fid: array[int] = field(default_factory=_whole)
    energy: array[float] = field(default_factory=_real)  #: the label as written, eV
    largest: array[float] = field(default_factory=_real)  #: largest force of each frame, eV/Å
    digest: array[int] = field(default_factory=_whole)  #: 64 bits of each frame's structure
    free: int = 0  #: free atoms
    squares: float = 0.0  #: of the forces' components, (eV/Å)²
    squares_free: float = 0.0  #: the same over free atoms
    elements: set[int] = field(default_factory=set)
    normal: Array = field(default_factory=lambda: np.zeros((_MAX_Z, _MAX_Z)))
    moment: Array = field(default_factory=lambda: np.zeros(_MAX_Z))

    def add(
        self,
        numbers: Any,
        fixed: Any,
        forces: Array | None,
        energy: float,
        explained: float,
        sid: int,
        fid: int,
        digest: int,
    ) -> None:
        """One frame, its label ``energy`` and the energy that references are to explain."""
        counts = np.bincount(numbers, minlength=_MAX_Z).astype(float)
        self.normal += counts[:, None] * counts[None, :]
        self.moment += counts * explained
        self.elements.update(int(z) for z in np.flatnonzero(counts))
        self.natoms.append(len(numbers))
        self.sid.append(sid)
        self.fid.append(fid)
        self.digest.append(digest)
        self.energy.append(energy)
        free = np.asarray(fixed) == 0
        self.free += int(free.sum())
        if forces is not None:
            squares = (forces.astype(float) ** 2).sum(axis=1)
            self.largest.append(float(np.sqrt(squares.max())))
            self.squares += float(squares.sum())
            self.squares_free += float(squares[free].sum())

    _COLUMNS = ("natoms", "sid", "fid", "energy", "largest", "digest")
    _SUMS = ("free", "squares", "squares_free", "normal", "moment")

    def save(self, file: Path) -> None:
        fields = {name: np.array(getattr(self, name)) for name in (*self._COLUMNS, *self._SUMS)}
        np.savez_compressed(file, elements=np.array(sorted(self.elements)), **fields)

    @classmethod
    def load(cls, file: Path) -> Tally:
        tally = cls()
        with np.load(file) as saved:
            for name in cls._COLUMNS:
                getattr(tally, name).extend(saved[name].tolist())
            for name in cls._SUMS:
                value = saved[name]
                setattr(tally, name, value.item() if value.ndim == 0 else value)
            tally.elements = {int(z) for z in saved["elements"]}
        return tally

    def merge(self, other: Tally) -> None:
        """Append another's frames."""
        for name in self._COLUMNS:
            getattr(self, name).extend(getattr(other, name))
        for name in self._SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.elements |= other.elements

    def references(self) -> dict[int, float]:
        """Energy per element in eV, by least squares; rounded to 1e-6 eV."""
        elements = sorted(self.elements)
        normal = self.normal[np.ix_(elements, elements)]
        values = np.linalg.lstsq(normal, self.moment[elements], rcond=1e-12)[0]
        return {z: round(float(value), 6) for z, value in zip(elements, values, strict=True)}

    def summary(self) -> dict[str, Any]:
        """What is compared between files and splits."""
        return {
            "frames": len(self.natoms),
            "atoms": sum(self.natoms),
            "elements": sorted(self.elements),
            "squares": self.squares,
        }

    def statistics(self, skipped: Counter[str]) -> dict[str, Any]:
        """What the card says of a split; forces only where there are any."""
        found: dict[str, Any] = {
            "frames": len(self.natoms),
            "trajectories": len(set(self.sid)),
            "skipped_frames": dict(sorted(skipped.items())),
            "elements": [chemical_symbols[z] for z in sorted(self.elements)],
            "natoms": _spread(self.natoms),
            "free_atoms": self.free,
        }
        if np.isfinite(self.energy).all():
            found["energy"] = _spread(self.energy)
        if self.largest:
            atoms, largest = sum(self.natoms), np.array(self.largest)
            found["force_rms"] = float(np.sqrt(self.squares / (3 * atoms)))
            found["force_rms_free"] = float(np.sqrt(self.squares_free / (3 * max(self.free, 1))))
            found["force_norm_max"] = {
                "median": float(np.median(largest)),
                "p95": float(np.percentile(largest, 95)),
                "max": float(largest.max()),
            }
        return found


def _spread(values: array[Any]) -> dict[str, float]:
    column = np.array(values, dtype=float)
    return {
        "mean": float(column.mean()),
        "std": float(column.std()),
        "min": float(column.min()),
        "max": float(column.max()),
    }


def rewrite(
    file: Path,
    dest: Path,
    references: dict[int, float] | None,
    *,
    totals: bool = False,
    everywhere: bool = False,
) -> array[float]:
    """Write a complete shard to ``dest``, changed.

    Args:
        references: eV, taken off the energies; None: they stay.
        totals: leave the references on, and write energies in double precision: a number that a
            sample holds is collated in single precision, which leaves 4 meV of -70 keV.
        everywhere: make structures periodic along all axes, with room along those that were not.

    Returns:
        The energies without references, eV, in order; NaN where there are none.
    """
    environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
    energies = _real()
    shard = Shard(dest)
    try:
        with environment.begin() as transaction:
            length = pickle.loads(transaction.get(b"length", b""))
            for index in range(length):
                sample = pickle.loads(transaction.get(str(index).encode("ascii"), b""))
                energies.append(_take_off(sample, references or {}, totals))
                if everywhere:
                    _make_periodic(sample)
                shard.add(sample)
        shard.close()
    except BaseException:
        shard.abandon()
        raise
    finally:
        environment.close()
    return energies


def _take_off(sample: Data, references: dict[int, float], totals: bool) -> float:
    """Change a sample's energy as it is to be written; returns it without the references, eV."""
    if sample.get("energy") is None:
        return float("nan")
    without = sample.energy - sum(
        references.get(int(z), 0.0) for z in sample.atomic_numbers.tolist()
    )
    sample.energy = torch.tensor(sample.energy, dtype=torch.float64) if totals else without
    return without


def _make_periodic(sample: Data) -> None:
    cell, pbc = sample.cell.numpy()[0], sample.pbc.numpy()[0]
    made = periodicity.everywhere(cell, pbc, sample.pos.numpy())
    sample.cell = torch.from_numpy(made).to(sample.cell.dtype)[None]
    sample.pbc = torch.ones_like(sample.pbc)
