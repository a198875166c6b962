"""What other packages offer under entry points of ours, found once in a process."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def offered(group: str) -> dict[str, Any]:
    """What installed packages offer under a group, by name; what cannot be loaded is told of.

    One that is broken must not break trainings that do not use it: it is left out, with a warning
    that names the package.
    """
    found: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        package = point.dist.name if point.dist is not None else "a package"
        if point.name in found:
            logging.warning(
                f"{package} offers {group} '{point.name}', which another package has offered "
                "already: the first is used; uninstall one of them."
            )
            continue
        try:
            found[point.name] = point.load()
        except Exception as error:  # whatever another package's import raises
            logging.warning(
                f"{package} offers {group} '{point.name}' ({point.value}), which cannot be "
                f"imported ({type(error).__name__}: {error}): it is left out; mend or uninstall "
                "the package."
            )
    return found
