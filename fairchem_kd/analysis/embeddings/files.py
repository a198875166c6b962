"""Features on disk, as npz or parquet, written as they come: memory holds one batch.

npz: ``sid``, ``fid`` and ``natoms`` ``(S,)`` of the structures, ``atomic_numbers`` ``(N,)`` of
their atoms, structure after structure, and an array for each feature, under its address:
``(N, C)``, vectors ``(N, 3, C)``; of pooled features with S rows. ``about`` is a JSON text.

parquet: a row for every atom (``structure``, ``sid``, ``fid``, ``atom``, ``atomic_number``) or, of
pooled features, for every structure (``natoms`` in place of the last two), and a column of lists
for each feature: C numbers, of vectors 3 C, those of x first. The file's metadata have ``about``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fairchem_kd.analysis.embeddings.extract import Chunk
from fairchem_kd.errors import UserError
from fairchem_kd.files import write_whole

FORMATS = (".npz", ".parquet")
ABOUT = "fairchem_kd"  # the key of a parquet file's metadata


def check_format(path: Path) -> None:
    """Make sure that ``path`` can be written, before long work is done for it.

    Raises:
        UserError: another ending than npz and parquet, or pyarrow is missing.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--out {path}: name a file that ends in {' or '.join(FORMATS)}.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{path}: parquet needs pyarrow, which is not there ({error}): pip install "
                "'fairchem-kd[parquet]' (or: pip install 'pyarrow<21'), or write .npz."
            ) from error


def write_features(chunks: Iterable[Chunk], path: Path, about: Mapping[str, Any]) -> Path:
    """Write ``chunks`` to ``path``, whole or not at all.

    Raises:
        UserError: see :func:`check_format`.
    """
    check_format(path)
    writer = _write_npz if path.suffix == ".npz" else _write_parquet
    text = json.dumps(about, ensure_ascii=False)
    return write_whole(path, lambda file: writer(chunks, file, text, path.parent))


class _Spool:
    """An array whose number of rows is not known yet: its bytes aside, its header to come."""

    def __init__(self, first: NDArray[Any], folder: Path, stack: ExitStack) -> None:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (the stack closes it)
        self.file = stack.enter_context(file)
        self.dtype, self.shape, self.rows = first.dtype, first.shape[1:], 0

    def append(self, values: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.rows += len(values)

    def copy_to(self, target: Any) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.shape),
        }
        np.lib.format.write_array_header_2_0(target, header)
        self.file.seek(0)
        shutil.copyfileobj(self.file, target, 2**20)


def _write_npz(chunks: Iterable[Chunk], file: BinaryIO, about: str, folder: Path) -> None:
    named: dict[str, list[Any]] = {"sid": [], "fid": []}
    with ExitStack() as stack:
        spools: dict[str, _Spool] = {}
        for chunk in chunks:
            named["sid"] += chunk.sid
            named["fid"] += chunk.fid
            arrays: dict[str, NDArray[Any]] = {
                "natoms": chunk.natoms,
                "atomic_numbers": chunk.atomic_numbers,
                **chunk.features,
            }
            for name, values in arrays.items():
                if name not in spools:
                    spools[name] = _Spool(values, folder, stack)
                spools[name].append(values)
        archive = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))
        small = {name: _of_names(values) for name, values in named.items()}
        for name, array in {**small, "about": np.array(about)}.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        for name, spool in spools.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                spool.copy_to(entry)


def _of_names(values: list[Any]) -> NDArray[Any]:
    """Integers where all are; else text."""
    if all(isinstance(value, (int, np.integer)) for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([str(value) for value in values])


def _write_parquet(chunks: Iterable[Chunk], file: BinaryIO, about: str, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    start = 0
    try:
        for chunk in chunks:
            structures = np.arange(start, start + len(chunk.natoms))
            repeats = np.ones_like(chunk.natoms) if chunk.pooled else chunk.natoms
            columns: dict[str, Any] = {
                "structure": np.repeat(structures, repeats),
                "sid": np.repeat([str(value) for value in chunk.sid], repeats),
                "fid": np.repeat([str(value) for value in chunk.fid], repeats),
            }
            if chunk.pooled:
                columns["natoms"] = chunk.natoms
            else:
                columns["atom"] = np.concatenate([np.arange(number) for number in chunk.natoms])
                columns["atomic_number"] = chunk.atomic_numbers
            for name, values in chunk.features.items():
                flat = np.ascontiguousarray(values.reshape(len(values), -1))
                columns[name] = pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(flat.reshape(-1)), flat.shape[1]
                )
            table = pyarrow.table(columns)
            if writer is None:
                schema = table.schema.with_metadata({ABOUT: about})
                writer = pyarrow.parquet.ParquetWriter(file, schema)
            writer.write_table(table.cast(writer.schema))
            start += len(chunk.natoms)
    finally:
        if writer is not None:
            writer.close()
