"""Data that a model's file names for itself, and whether they are to be opened.

Samples of an LMDB are pickles, which can run code, so that a file must not choose which are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: What stock unpickles beside the samples; none of it is needed to read structures and labels.
UNPICKLED = ("lin_ref", "oc20_ref")
#: What names other files than the samples, in a config of them.
BESIDE = (*UNPICKLED, "metadata_path", "index_file", "splits")


def places(settings: Any) -> Iterator[str]:
    """Every text in a data set's config that could be a place, however deep it stands."""
    if isinstance(settings, Mapping):
        for value in settings.values():
            yield from places(value)
    elif isinstance(settings, list | tuple | set):
        for value in settings:
            yield from places(value)
    elif isinstance(settings, str):
        yield settings


def outside(settings: Any) -> str | None:
    """The first place in a data set's config that is not below the current directory."""
    here = Path.cwd().resolve()
    for place in places(settings):
        try:
            below = "\0" not in place and Path(place).resolve().is_relative_to(here)
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long
            below = False
        if not below or "://" in place:
            return place
    return None


def unpickled(settings: Any) -> str | None:
    """The first key in a data set's config whose file stock unpickles."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key in UNPICKLED and value:
                return str(key)
            if (found := unpickled(value)) is not None:
                return found
    elif isinstance(settings, list | tuple):
        return next((found for one in settings if (found := unpickled(one)) is not None), None)
    return None
