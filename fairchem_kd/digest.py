"""Digests of files."""

from __future__ import annotations

import hashlib
import os

_BLOCK_BYTES = 1 << 20


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The digest of a file, in hexadecimal digits; read block by block, however large it is.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
