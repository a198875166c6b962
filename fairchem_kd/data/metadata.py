"""``metadata.npz`` beside samples: how many atoms each has, by which stock balances its batches.

Stock unpickles this file, and takes it at its word until a sampler asks for what is not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairchem_kd.errors import UserError
from fairchem_kd.npz import array_headers, read_array

METADATA = "metadata.npz"
_SIZES = "natoms"


def check_metadata(file: Path, where: str, samples: int | None) -> None:
    """Refuse an index that is not the one of its samples; none is fine.

    Args:
        file: the index, which need not be there.
        where: the key that names it, for errors.
        samples: how many there are, where that is known.

    Raises:
        UserError: what is wrong with it.
    """
    if not file.exists():
        return
    try:
        problem = _problem(file, samples)
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"{where}: the index {file.absolute()} cannot be used: {problem}; copy or build the "
            "data set again, or remove the index, and batches are not balanced by it."
        )


def _problem(file: Path, samples: int | None) -> str:
    """What is wrong with an index; empty where nothing is."""
    headers = array_headers(file)
    if _SIZES not in headers:
        return f"it has no array '{_SIZES}'"
    shape, dtype = headers[_SIZES]
    if len(shape) != 1 or dtype.kind not in "iu":
        return f"its array '{_SIZES}' is of {dtype} {shape}, and each sample has one whole number"
    for name, (other, _) in headers.items():
        if other[:1] != shape:
            return f"its array '{name}' has the shape {other}, and '{_SIZES}' {shape}"
    if samples is not None and shape[0] != samples:
        return f"it is of {shape[0]:,} samples, and there are {samples:,}"
    sizes = read_array(file, _SIZES)
    if len(sizes) and int(np.min(sizes)) < 1:
        return f"sample {int(np.argmin(sizes))} has {int(np.min(sizes))} atoms by it"
    return ""
