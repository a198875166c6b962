"""To which structures a round can add its own: those of which the teacher alone speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_kd.errors import UserError

_WHERE = "task.distillation.unlabelled.dataset"
_KNOWN = ("format", "src", "build")


def check_pool(dataset: Mapping[str, Any]) -> None:
    """Refuse a data set to which no structures can be added.

    Raises:
        UserError: it is of another format, or something is chosen of it.
    """
    strange = [key for key, value in dataset.items() if key not in _KNOWN and value is not None]
    if dataset.get("format", "lmdb") != "lmdb" or strange:
        named = f"{_WHERE}.{strange[0]}" if strange else f"{_WHERE}.format"
        raise UserError(
            f"Rounds add structures to {_WHERE}, for which it has to be a folder of LMDBs that is "
            f"taken whole, and the config has {named}: leave that out, or convert the data set "
            "(`fairchem-kd data convert`)."
        )
