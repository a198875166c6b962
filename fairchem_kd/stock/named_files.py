"""Files of numbers that a config names, tried before stock opens them hours or a traceback later.

Scale factors, normalisers and element references: a ``.pt`` that torch reads, or an ``.npz``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairchem_kd.errors import UserError
from fairchem_kd.npz import array_headers, read_array

_SUFFIXES = (".pt", ".npz")
_REFERENCES = ("element_references", "coeff")


def check_units(settings: Any, where: str) -> None:
    """Refuse files of normalisers or references that cannot be read.

    Args:
        settings: a transform's: ``{file: ...}`` or by target ``{energy: {file: ...}}``.
        where: its key in the config.

    Raises:
        UserError: naming key and file.
    """
    if not isinstance(settings, Mapping):
        return
    references = where.endswith("element_references")
    if settings.get("file") is not None:
        check_loadable(settings["file"], f"{where}.file", (".pt",))
    for target, values in settings.items():
        if target in ("file", "fit") or not isinstance(values, Mapping):
            continue
        if values.get("file") is not None:
            here = f"{where}.{target}.file"
            check_loadable(values["file"], here, _SUFFIXES, references=references)


def check_loadable(
    given: Any, where: str, suffixes: tuple[str, ...] = (), *, references: bool = False
) -> None:
    """Refuse a file that is missing, of another kind, or that torch or numpy would not read.

    Before torch 2.6 stock unpickles what a config names, which is taken as it is.

    Args:
        suffixes: that stock knows; any where there are none.
        references: whether an ``.npz`` has to hold element references.

    Raises:
        UserError: naming key and file.
    """
    if not isinstance(given, str):
        raise UserError(f"{where} must be the path of a file, not {given!r:.60}.")
    path = Path(given)
    if not path.is_file():
        raise UserError(f"{where}: {path.absolute()} does not exist; fix the path.")
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{where}: {path} is none of {', '.join(suffixes)}, which fairchem reads.")
    try:
        if path.suffix == ".npz":
            _check_arrays(path, references=references)
        elif tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a loader makes of bytes that are none of its own
        reason = str(error).rpartition("WeightsUnpickler error:")[2].split("\n\n")[0]
        words = " ".join(reason.split())[:200] or type(error).__name__
        raise UserError(
            f"{where}: {path} cannot be read ({words}): it is damaged, or holds more than numbers; "
            "copy it again, or have it fitted anew."
        ) from error


def _check_arrays(path: Path, *, references: bool) -> None:
    headers = array_headers(path)
    if not references:
        return
    name = next((name for name in reversed(_REFERENCES) if name in headers), None)
    if name is None:
        raise ValueError(f"it has no array '{_REFERENCES[0]}'")
    values = read_array(path, name)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ValueError(f"its '{name}' is {values.dtype} {values.shape}, not one number each")
    if not all(map(math.isfinite, values.tolist())):
        raise ValueError(f"its '{name}' has NaN or infinity")
