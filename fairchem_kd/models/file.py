"""Checkpoints on disk: read without executing code, written whole or not at all.

``torch.load`` unpickles, and a pickle may run anything. Here a file is read with
``weights_only=True`` and a short list of harmless types that stock fairchem checkpoints hold
besides tensors: numpy scalars (metrics, configs), paths and defaultdicts.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import torch

from fairchem_kd.errors import UserError
from fairchem_kd.files import write_whole
from fairchem_kd.models import gate
from fairchem_kd.models.card import check_digest
from fairchem_kd.models.module_file import ABOUT
from fairchem_kd.weights_only import weights_only

#: The keys without which nothing can be done with a fairchem 1.x checkpoint.
REQUIRED_KEYS = ("state_dict", "config")

_FAIRCHEM_2 = "fairchem.core.units"  # the package whose classes fairchem 2 pickles


#: How much more than its own size a file may unpack to, for those that were compressed.
_MAX_RATIO = 20

#: What a user does who wants a file read that is refused for what it might execute.
TRUST_HINT = (
    "if you trust where it comes from, set task.distillation.teacher.trust_checkpoint: true (with "
    "fairchem-kd: --trust)"
)


def refuse_missing(path: Path) -> None:
    """Refuse a checkpoint that is not there.

    Raises:
        UserError: it names the file, and the folder from which it was sought.
    """
    if not path.exists():
        raise UserError(
            f"The checkpoint {path} does not exist; relative paths start from the current "
            f"directory, {Path.cwd()}."
        )


def read_checkpoint(
    path: str | Path, *, trust: bool = False, hint: str = TRUST_HINT, own: bool = False
) -> dict[str, Any]:
    """The contents of a fairchem 1.x checkpoint, tensors on the CPU.

    Args:
        path: the file, relative to the current directory.
        trust: unpickle a file that holds other types than tensors and plain values, which lets it
            run any code that its author chose, and let its config name anything by import path.
        hint: what to do about a file that needs ``trust``.
        own: the user's own config is at hand, and nothing will be made of the file's.

    Raises:
        UserError: the file is missing, truncated, no checkpoint, one of fairchem 2, or one that
            needs ``trust``, or not the one that the card beside it is of.
    """
    path = Path(path)
    refuse_missing(path)
    if not path.is_file():
        raise UserError(f"The checkpoint {path} is not a file; give the .pt file inside it.")
    _check_container(path)
    check_digest(path)
    try:
        if trust:
            contents = torch.load(path, map_location="cpu", weights_only=False)
        else:
            with _allowed():
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = _culprit(error)
        if culprit.startswith(_FAIRCHEM_2):
            raise UserError(_of_fairchem_2(path)) from error
        if trust or culprit == "":
            raise UserError(_broken(path, error)) from error
        raise UserError(
            f"The checkpoint {path} holds more than tensors and plain values ({culprit}), "
            f"and unpickling that could run any code; {hint}."
        ) from error
    except ImportError as error:
        if str(error.name).startswith(_FAIRCHEM_2):
            raise UserError(_of_fairchem_2(path)) from error
        raise UserError(
            f"The checkpoint {path} needs a Python module that is not installed: {error}."
        ) from error
    except Exception as error:  # whatever the loader makes of bytes that torch did not write
        raise UserError(_broken(path, error)) from error
    contents = _checked(contents, path)
    if not trust:
        _pass_gate(contents, path, hint, own=own)
    return contents


def write_checkpoint(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    previous: str | Path | None = None,
    before: Callable[[Path], Any] | None = None,
) -> Path:
    """Write ``state`` to ``path``, whole or not at all (see :func:`write_whole`)."""

    def save(file: BinaryIO) -> None:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            # torch ends its archive even where writing failed, and that error hides the reason
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    return write_whole(path, save, previous=previous, before=before)


def _check_container(path: Path) -> None:
    """Refuse what is neither a zip (torch >= 1.6) nor a bare pickle, before torch guesses."""
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise UserError(f"The checkpoint {path} is empty; copy or download it again.")
    if head[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"The checkpoint {path} is truncated ({path.stat().st_size} bytes, no end of "
                "archive); copy or download it again."
            )
        _check_sizes(path)
        _refuse_module(path)
    elif head[:1] != b"\x80":
        hint = " (a Git LFS pointer: run `git lfs pull`)" if head == b"vers" else ""
        raise UserError(f"{path} is not a PyTorch checkpoint{hint}.")


def _refuse_module(path: Path) -> None:
    """Refuse a student's module, which is an archive of torch's too."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(PurePath(name).name == ABOUT for name in names):
        raise UserError(
            f"{path} is no checkpoint but a module of `fairchem-kd export --module`, which "
            "ModuleCalculator reads: name the checkpoint or the run that it was made of."
        )


def _check_sizes(path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is, before anything is unpacked.

    torch stores tensors as they are, so that a checkpoint is as large as what it holds. Each record
    has a checksum, which torch does not look at: a flipped bit would be another weight.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            damaged = [] if unpacked > _MAX_RATIO * size else _damaged(archive)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(_broken(path, error)) from error
    if unpacked > _MAX_RATIO * size:
        raise UserError(
            f"The checkpoint {path} is refused: its {size:,} bytes would unpack to {unpacked:,}, "
            "which no checkpoint does."
        )
    if damaged:
        raise UserError(
            f"The checkpoint {path} is damaged: the checksum of {damaged[0]} in it is wrong; copy "
            "or download it again."
        )


def _damaged(archive: zipfile.ZipFile) -> list[str]:
    """The records whose checksum is wrong; none where the file has none.

    ``torch.serialization.set_crc32_options(False)`` writes files without: then all are wrong.
    """
    wrong, right = [], 0
    for entry in archive.infolist():
        try:
            with archive.open(entry) as record:
                while record.read(1 << 20):
                    pass
            right += entry.file_size > 0
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise
            wrong.append(entry.filename)
    return wrong if right else []


def _broken(path: Path, error: BaseException) -> str:
    detail = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = detail.splitlines() or [type(error).__name__]
    return (
        f"The checkpoint {path} cannot be read: it is damaged or not a PyTorch checkpoint "
        f"({reason[0][:200]})."
    )


def _culprit(error: BaseException) -> str:
    """The type that the loader refused, out of torch's long message; "" where none is named."""
    named = re.search(
        r"(?:GLOBAL|[Uu]nsupported class|[Tt]rying to (?:load|call reduce for|instantiate))"
        r"(?: unsupported)?(?: class| GLOBAL| function)? ([\w.<>]+)",
        str(error),
    )
    return named.group(1).rstrip(".") if named else ""


def _of_fairchem_2(path: Path) -> str:
    return (
        f"{path} is a checkpoint of fairchem 2, which fairchem-core 1.x cannot build; use one that "
        "fairchem-core 1.x wrote."
    )


def _checked(contents: Any, path: Path) -> dict[str, Any]:
    """The contents if they are a fairchem 1.x checkpoint."""
    if isinstance(contents, Mapping) and "model_config" in contents and "config" not in contents:
        raise UserError(_of_fairchem_2(path))
    if not isinstance(contents, dict):
        raise UserError(
            f"{path} holds a {type(contents).__name__}, which is not what a fairchem checkpoint is."
        )
    missing = [key for key in REQUIRED_KEYS if key not in contents]
    if missing:
        held = ", ".join(sorted(map(str, contents))[:8]) or "nothing"
        raise UserError(
            f"{path} is not a fairchem checkpoint: it has no {' and no '.join(missing)} "
            f"(it holds {held})."
        )
    config = contents["config"]
    if not isinstance(config, Mapping) or "model" not in config:
        raise UserError(f"{path} is not a fairchem checkpoint: its config names no model.")
    if not isinstance(contents["state_dict"], Mapping) or not contents["state_dict"]:
        raise UserError(f"{path} holds no weights: its state_dict is empty.")
    return contents


def _pass_gate(contents: Mapping[str, Any], path: Path, hint: str, *, own: bool) -> None:
    """Refuse what the file holds that could run code, exhaust memory, or is no checkpoint's."""
    config = contents["config"]
    try:
        gate.check_weights(contents)
        if own:
            gate.check_plain(config)
        else:
            gate.check_config(config)
            gate.check_config(_updated(config))
            gate.without_trust(config)
    except gate.NotAllowed as refusal:
        if refusal.needs_trust:
            raise UserError(f"The checkpoint {path} is refused: {refusal}; {hint}.") from refusal
        raise UserError(
            f"The checkpoint {path} is damaged, or not what fairchem writes: {refusal}; take "
            "another copy of it."
        ) from refusal


def _updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it is once the keys of older releases have become those of this one.

    Raises:
        gate.NotAllowed: it cannot be brought up to date.
    """
    from fairchem_kd.models.legacy import modern_config

    try:
        return modern_config(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise gate.NotAllowed(f"its config is of no release of fairchem ({error})") from error


# What a checkpoint may hold besides tensors. Pickles name a function or a type by module and name;
# these stand in for the real ones, do no more than rebuild a plain value, and carry both the names
# of numpy 1 and 2, so that a file of either can be read under either.


def _named(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """A function that pickles call ``module.name``."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, name, name
    return stand_in


def _numpy_scalar(dtype: np.dtype, data: Any) -> Any:
    """A number or bool as a Python value: that is what metrics and configs mean by it."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"Unsupported class numpy scalar of {dtype}")
    return np.frombuffer(data, dtype=dtype, count=1)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2, torch.save's, spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"Unsupported class bytes in {encoding}")
    return text.encode(encoding)


def _path(*parts: str) -> str:
    return str(PurePath(*parts))


def _allow_list() -> list[Any]:
    dtypes = {type(np.dtype(kind)) for kind in ("?", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}
    dtypes |= {type(np.dtype(kind)) for kind in ("u1", "u2", "u4", "u8")}
    allowed: list[Any] = [np.dtype, *dtypes, torch.device, dict, list, int, float, set]
    allowed.append(_named(_latin1, "_codecs", "encode"))
    allowed.append(_named(lambda *_: {}, "collections", "defaultdict"))
    allowed += [_named(_numpy_scalar, f"numpy.{core}.multiarray", "scalar") for core in _CORES]
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            allowed.append(_named(_path, module, name))
    return allowed


_CORES = ("core", "_core")


@contextmanager
def weights_only_everywhere() -> Iterator[None]:
    """Within the block stock reads every file as this module does, whichever a config names.

    Stock calls ``torch.load`` as it comes, which before torch 2.6 unpickles: scale factors,
    normalisers and references that a checkpoint's config names by path, too.
    """
    with weights_only(), _allowed():
        yield


@contextmanager
def _allowed() -> Iterator[None]:
    """Our allow-list in place of what others added; torch 2.4 has no context manager for that."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_allow_list())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
