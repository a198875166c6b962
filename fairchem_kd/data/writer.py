"""Writing a split for fairchem's stock ``lmdb`` format."""

from __future__ import annotations

import pickle
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch_geometric.data import Data

from fairchem_kd.data.frames import Array, Frame
from fairchem_kd.data.splits import Split

BYTES_PER_ATOM = 120  # of a pickled sample, with what LMDB's pages add, rounded up
BYTES_PER_SAMPLE = 6000


def to_data(frame: Frame, energy: float, sid: int, fid: int) -> Data:
    """The sample that fairchem reads: pos ``(N, 3)``, cell ``(1, 3, 3)``, energy a float, ..."""
    return Data(
        pos=torch.from_numpy(frame.pos.copy()),
        cell=torch.from_numpy(frame.cell.copy())[None],
        atomic_numbers=torch.from_numpy(frame.numbers.copy()),
        natoms=len(frame.numbers),
        tags=torch.from_numpy(frame.tags.copy()),
        fixed=torch.from_numpy(frame.fixed.copy()),
        pbc=torch.ones(1, 3, dtype=torch.bool),
        energy=float(energy),
        forces=torch.from_numpy(frame.forces.copy()),
        sid=sid,
        fid=fid,
    )


def write_split(folder: Path, split: Split, energies: Array, length: int | None = None) -> None:
    """Write the first ``length`` frames as ``data.0000.lmdb`` with their ``metadata.npz``.

    Each folder holds its own copy: LMDB refuses to open one file twice in a process, however it is
    linked, and a run may well train on a quarter and take unlabelled structures from the whole.

    Raises:
        OSError: the folder cannot be written.
        lmdb.Error: the same, from LMDB.
    """
    length = len(split) if length is None else length
    folder.mkdir(parents=True)
    samples = [
        pickle.dumps(to_data(frame, energy, sid, fid), protocol=4)
        for frame, energy, sid, fid in zip(
            split.frames[:length], energies, split.sids, split.fids, strict=False
        )
    ]
    size = sum(-(-len(sample) // 4096) * 4096 + 4096 for sample in samples)
    environment = lmdb.open(
        str(folder / "data.0000.lmdb"), subdir=False, lock=False, meminit=False, map_async=True,
        map_size=2 * size + 2**22,
    )  # fmt: skip
    try:
        with environment.begin(write=True) as transaction:
            for number, sample in enumerate(samples):
                transaction.put(str(number).encode("ascii"), sample)
            transaction.put(b"length", pickle.dumps(length, protocol=4))
        environment.sync(True)
    finally:
        environment.close()
    infos = split.infos[:length]
    np.savez(
        folder / "metadata.npz",
        natoms=np.array([len(frame.numbers) for frame in split.frames[:length]], dtype=np.int64),
        sid=np.array(split.sids[:length], dtype=np.int64),
        fid=np.array(split.fids[:length], dtype=np.int64),
        **{key: np.array([info[key] for info in infos]) for key in infos[0]},
    )
