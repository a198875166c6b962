"""Several splits as one, for stock, which reads one folder of LMDBs.

Their files are put side by side, by hard links where the file system has them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_kd.data.metadata import METADATA
from fairchem_kd.errors import UserError
from fairchem_kd.npz import read_array


def make_pool(folder: Path, sources: Sequence[Path]) -> None:
    """Put the LMDBs of several splits, or single files, into one folder, in their order.

    Args:
        folder: made anew, aside and then renamed.
        sources: folders of splits, or LMDBs.

    Raises:
        UserError: one of them has no LMDB.
        OSError: they cannot be written there.
    """
    aside = folder.with_name(f".{folder.name}.part")
    for old in (aside, folder):
        if old.exists():
            shutil.rmtree(old)
    aside.mkdir(parents=True)
    sizes, number = [], 0
    for source in sources:
        files = sorted(source.glob("*.lmdb")) if source.is_dir() else [source]
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"{source} has no LMDB: name the folder of a split, or an LMDB.")
        for file in files:
            _link(file, aside / f"data.{number:06d}.lmdb")
            number += 1
        sizes.append(_sizes(source / METADATA) if source.is_dir() else None)
    if all(one is not None for one in sizes):
        np.savez(aside / METADATA, natoms=np.concatenate([one for one in sizes if one is not None]))
    aside.rename(folder)


def _sizes(index: Path) -> Any:
    """Atoms of each structure; None where no index says."""
    try:
        return read_array(index, "natoms").astype(np.int64)
    except (OSError, ValueError):
        return None


def _link(file: Path, dest: Path) -> None:
    try:
        os.link(file.resolve(), dest)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, dest)
