"""What came of a group of structures, in a file: it is there as a whole, or the group is not done.

An ``.npz`` of ``start`` (F,), ``natoms`` (F,), ``kind`` (F,), ``value`` (F,), ``labelled`` (F,),
``energy`` (F,) in eV, ``pos`` (A, 3) in Å and ``forces`` (A, 3) in eV/Å, rows of atoms going by
frame; ``reasons`` and ``counts`` (R,); ``differences`` (D,) in eV/Å.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from fairchem_kd.explore.potentials import Answer
from fairchem_kd.explore.settings import Found, Group
from fairchem_kd.files import write_whole
from fairchem_kd.npz import read_array

_ARRAYS = ("start", "natoms", "kind", "value", "labelled", "energy", "pos", "forces")


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
    write_whole(path, lambda file: np.savez(file, **arrays))


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
    found = []
    for row, stop in enumerate(stops):
        atoms = slice(int(stop - arrays["natoms"][row]), int(stop))
        answer = None
        if arrays["labelled"][row]:
            forces = arrays["forces"][atoms].astype(np.float64)
            answer = Answer(float(arrays["energy"][row]), forces)
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
