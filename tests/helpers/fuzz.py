"""How often a seeded test of mutated inputs tries: a fixed number, more by hand (`make fuzz`)."""

from __future__ import annotations

import os
import random


def rounds(usual: int) -> int:
    """``usual``, or as many as FUZZ says."""
    return int(os.environ.get("FUZZ", usual))


def chance() -> random.Random:
    """The same for everybody; another one for each FUZZ_SEED."""
    return random.Random(int(os.environ.get("FUZZ_SEED", "0")))
