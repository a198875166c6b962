"""By how much neighbours are looked for beyond a model's cutoff, so that they serve for a while."""

from __future__ import annotations

import math
from typing import Any

from fairchem_kd.errors import UserError

SKIN = 0.6  #: Å; about 20 steps of 0.5 fs of hydrogen at 1000 K
LEAST_SKIN = 0.01  #: Å; below it hardly a step is without a search


def checked_skin(skin: Any) -> float:
    """A skin in Å that was given by the user.

    Raises:
        UserError: it is no length, or too small a one.
    """
    good = isinstance(skin, int | float) and not isinstance(skin, bool) and math.isfinite(skin)
    if not good or skin < LEAST_SKIN:
        raise UserError(
            f"skin is {skin!r}, and has to be a length of at least {LEAST_SKIN} Å, since "
            "neighbours are searched anew once an atom has moved by half of it: leave it out "
            f"({SKIN}), or give more."
        )
    return float(skin)
