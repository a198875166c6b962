"""What came of a group of structures, in a file: it is there as a whole, or the group is not done.

An ``.npz`` of ``start`` (F,), ``natoms`` (F,), ``kind`` (F,), ``value`` (F,), ``labelled`` (F,),
``energy`` (F,) in eV, ``pos`` (A, 3) in Å and ``forces`` (A, 3) in eV/Å, rows of atoms going by
frame; ``reasons`` and ``counts`` (R,); ``differences`` (D,) in eV/Å. Where a calculator was asked
about all frames, ``columns`` (K,) names what a store keeps of its answers, and ``column_0`` and so
on have it: a row of a column of structures for each frame, else one for each atom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_kd.explore.potentials import Answer
from fairchem_kd.explore.settings import Found, Group
from fairchem_kd.files import write_whole
from fairchem_kd.npz import read_array
from fairchem_kd.store.names import ENERGY, output_column

_ARRAYS = ("start", "natoms", "kind", "value", "labelled", "energy", "pos", "forces")

_OF_STRUCTURES = output_column(ENERGY)  # all other columns are of atoms


def write_group(path: Path, group: Group) -> None:
    """Write it, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    found = group.found
    empty = np.zeros((0, 3), "<f4")
    forces = [np.zeros_like(f.pos) if f.answer is None else f.answer.forces for f in found]
    arrays = {
        "start": np.array([f.start for f in found], np.int64),
        "natoms": np.array([len(f.pos) for f in found], np.int64),
        "kind": np.array([f.kind for f in found], "U16"),
        "value": np.array([f.value for f in found], float),
        "labelled": np.array([f.answer is not None for f in found], bool),
        "energy": np.array([0.0 if f.answer is None else f.answer.energy for f in found], float),
        "pos": np.concatenate([empty, *(f.pos for f in found)]).astype("<f4"),
        "forces": np.concatenate([empty, *forces]).astype("<f4"),
        "reasons": np.array(list(group.counts), str),
        "counts": np.array(list(group.counts.values()), np.int64),
        "differences": np.array(group.differences, float),
    }
    arrays |= _kept(found)
    write_whole(path, lambda file: np.savez(file, **arrays))


def _kept(found: Sequence[Found]) -> dict[str, Any]:
    """What a store keeps of the answers about these frames, as far as all of them have it."""
    said = [one.answer.kept for one in found if one.answer is not None and one.answer.kept]
    if not said or len(said) < len(found):
        return {"columns": np.array([], "U1")}
    names = [name for name in said[0] if all(name in one for one in said)]  # in a store's order
    arrays = {f"column_{i}": np.concatenate([one[name] for one in said])
              for i, name in enumerate(names)}  # fmt: skip
    return {"columns": np.array(names), **arrays}


def read_group(path: Path) -> Group:
    """What :func:`write_group` wrote.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged, or none.
    """
    arrays = {name: read_array(path, name) for name in _ARRAYS}
    stops = np.cumsum(arrays["natoms"])
    if len(stops) and stops[-1] != len(arrays["pos"]):
        raise ValueError("its frames do not have as many atoms as they say")
    columns = _columns(path, arrays["natoms"])
    found = []
    for row, stop in enumerate(stops):
        atoms = slice(int(stop - arrays["natoms"][row]), int(stop))
        answer = None
        if arrays["labelled"][row]:
            forces = arrays["forces"][atoms].astype(np.float64)
            kept = {
                name: values[row : row + 1] if name == _OF_STRUCTURES else values[atoms]
                for name, values in columns.items()
            }
            answer = Answer(float(arrays["energy"][row]), forces, kept or None)
        found.append(
            Found(
                int(arrays["start"][row]),
                arrays["pos"][atoms].astype(np.float64),
                str(arrays["kind"][row]),
                float(arrays["value"][row]),
                answer,
            )
        )
    reasons, counts = read_array(path, "reasons"), read_array(path, "counts")
    counted = Counter(dict(zip(map(str, reasons), map(int, counts), strict=True)))
    return Group(found, counted, read_array(path, "differences").tolist())


def _columns(path: Path, natoms: np.ndarray) -> dict[str, np.ndarray]:
    """What a store keeps of all answers, by column.

    Raises:
        ValueError: a column has another number of rows than there are frames or atoms.
    """
    columns = {
        str(name): read_array(path, f"column_{i}")
        for i, name in enumerate(read_array(path, "columns"))
    }
    for name, values in columns.items():
        rows = len(natoms) if name == _OF_STRUCTURES else int(natoms.sum())
        if len(values) != rows:
            raise ValueError(f"{name} does not have as many rows as there are frames or atoms")
    return columns
