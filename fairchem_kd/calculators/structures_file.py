"""Structures in one file of numpy arrays, to be asked about in another environment.

``fairchem-kd teach CONFIG.yml --structures FILE`` writes what a training will ask its teacher, the
copies in pools included; the file that ``--writer`` writes reads it. An ``.npz`` of ``format``,
``natoms`` (S,), ``numbers`` (A,), ``pos`` (A, 3) in Å, ``cell`` (S, 3, 3) in Å, ``pbc`` (S, 3),
``tags`` (A,), ``source`` (S,) into ``sources``, and ``place`` (S,) in the source; rows of atoms go
by structure; pbc and tags are -1 where nobody says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fairchem_kd.calculators.filling import Item
from fairchem_kd.errors import UserError
from fairchem_kd.npz import array_headers, read_array
from fairchem_kd.store.format import STRUCTURE, Array, Structure

FILE_FORMAT = 1
#: By array, how many axes it has and what kind of number it holds.
_ARRAYS = {
    "format": (0, "iu"),
    "natoms": (1, "iu"),
    "numbers": (1, "u"),
    "pos": (2, "f"),
    "cell": (3, "f"),
    "pbc": (2, "i"),
    "tags": (1, "i"),
    "source": (1, "iu"),
    "place": (1, "iu"),
    "sources": (1, "U"),
}


def write_structures(path: Path, items: Iterable[Item]) -> int:
    """Write structures, each of them once; returns how many.

    Raises:
        OSError: it cannot be written.
    """
    columns: dict[str, list[Array]] = {column.name: [] for column in STRUCTURE}
    sources: dict[str, int] = {}
    natoms, source, place = [], [], []
    seen: set[bytes] = set()
    for item in items:
        key = item.structure.key()
        if key in seen:
            continue
        seen.add(key)
        for name, values in item.structure.columns().items():
            columns[name].append(values)
        natoms.append(len(item.structure.numbers))
        source.append(sources.setdefault(item.source, len(sources)))
        place.append(item.number)
    arrays: dict[str, Array] = {}
    for column in STRUCTURE:
        own = columns[column.name]
        joint = np.concatenate if column.per == "atom" else np.stack
        empty = np.zeros((0, *column.shape), column.stored)
        arrays[column.name] = joint(own).astype(column.stored) if own else empty
    arrays |= {
        "format": np.array(FILE_FORMAT),
        "natoms": np.array(natoms, "<u4"),
        "source": np.array(source, "<u4"),
        "place": np.array(place, "<u8"),
        "sources": np.array(list(sources), str),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(natoms)


class StructuresFile:
    """A file of structures, read and checked whole.

    Raises:
        UserError: it is none, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._arrays = _read(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: name a file of structures.") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is no file of structures ({error}): write one with `fairchem-kd teach "
                "CONFIG.yml --structures FILE`."
            ) from None

    def __len__(self) -> int:
        return len(self._arrays["natoms"])

    def items(self, part: int = 0, parts: int = 1) -> Iterator[Item]:
        """Every ``parts``-th structure from ``part`` on."""
        held = self._arrays
        stops = held["natoms"].astype(np.int64).cumsum()
        for row in range(part, len(self), parts):
            atoms = slice(stops[row] - int(held["natoms"][row]), stops[row])
            pbc, tags = held["pbc"][row], held["tags"][atoms]
            yield Item(
                str(held["sources"][held["source"][row]]),
                int(held["place"][row]),
                Structure(
                    held["numbers"][atoms],
                    held["pos"][atoms],
                    held["cell"][row],
                    None if (pbc < 0).any() else pbc,
                    None if (tags < 0).any() else tags,
                ),
            )


def _read(path: Path) -> dict[str, Array]:
    """Its arrays.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else; in a few words.
    """
    headers = array_headers(path)
    for name, (axes, kinds) in _ARRAYS.items():
        if name not in headers:
            raise ValueError(f"it has no array '{name}'")
        shape, dtype = headers[name]
        if len(shape) != axes or dtype.kind not in kinds:
            raise ValueError(f"its array '{name}' is {dtype} of the shape {shape}")
    arrays = {name: read_array(path, name) for name in _ARRAYS}
    if int(arrays["format"]) != FILE_FORMAT:
        raise ValueError(f"it has format {int(arrays['format'])}, and this reads {FILE_FORMAT}")
    structures, atoms = len(arrays["natoms"]), int(arrays["natoms"].sum())
    shapes = {
        **dict.fromkeys(("source", "place"), (structures,)),
        "cell": (structures, 3, 3),
        "pbc": (structures, 3),
        "pos": (atoms, 3),
        **dict.fromkeys(("numbers", "tags"), (atoms,)),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"its array '{name}' has the shape {arrays[name].shape}, not {shape}")
    if structures and int(arrays["source"].max()) >= len(arrays["sources"]):
        raise ValueError("its array 'source' names sources that it has not")
    for name in ("pos", "cell"):
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"its array '{name}' is not finite everywhere")
    if atoms and int(arrays["numbers"].min()) < 1:
        raise ValueError("its array 'numbers' has atoms without an element")
    return arrays
