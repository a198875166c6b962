"""Arrays of an ``.npz`` that someone else may have written: not unpickled, no larger than it."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairchem_kd.json_file import Unreadable, opened

_ZIP = (zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error)
MAX_ARRAY = 1 << 32  # bytes of one array


def array_headers(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array of an ``.npz``, without reading or unpickling any of them.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it is no such archive, one of its arrays is of objects, which is a pickle, or
            claims to be larger than what the file holds.
    """
    with _archive(path) as archive:
        return {
            entry.filename.removesuffix(".npy"): _header(archive, entry)
            for entry in archive.infolist()
        }


def read_array(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """One array of an ``.npz``; see :func:`array_headers`.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it has no such array, or not a whole one.
    """
    with _archive(path) as archive:
        try:
            entry = archive.getinfo(f"{name}.npy")
        except KeyError:
            raise Unreadable(f"it has no array '{name}'") from None
        _header(archive, entry)
        with archive.open(entry) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


class _Archive(zipfile.ZipFile):
    """Whatever goes wrong with a damaged one is an `Unreadable`."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        damages = (OSError, ValueError, EOFError, RuntimeError, OverflowError, *_ZIP)
        if isinstance(error, damages) and not isinstance(error, Unreadable):
            raise Unreadable(f"it is damaged: {error}") from error


def _archive(path: str | os.PathLike[str]) -> _Archive:
    with opened(path):  # a regular file
        pass
    try:
        return _Archive(path)
    except (OSError, ValueError, OverflowError, *_ZIP) as error:  # seeks to nowhere as well
        raise Unreadable(f"it is no archive of numpy's: {error}") from error


def _header(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(entry) as member:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(np.lib.format.read_magic(member))
        if read is None:
            raise Unreadable(f"'{entry.filename}' in it is of another format of numpy's")
        shape, _, dtype = read(member)
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if dtype.hasobject:
            raise Unreadable(
                f"its array '{entry.filename}' is of objects, which are pickles and could run code"
            )
        if size < 0 or size > MAX_ARRAY or size != entry.file_size - member.tell():
            raise Unreadable(
                f"its array '{entry.filename}' claims the shape {shape} and has other bytes"
            )
    return shape, dtype
