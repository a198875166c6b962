"""Random states: kept apart while distillation sets itself up, and carried through a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of every global generator, as tensors and plain values (no pickled objects)."""
    version, internal, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "pos": int(pos),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global generator back to a state from :func:`random_state`.

    GPU states are restored where the number of GPUs is still the same.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy["name"], keys, numpy["pos"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def same_draws(device: torch.device | str, seed: int = 0) -> Iterator[None]:
    """Within the block torch draws the same numbers each time, and goes on as if it had drawn none.

    Args:
        device: whose generator is meant beside that of the CPU.
        seed: of both.
    """
    device = torch.device(device)
    own = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        torch.default_generator.manual_seed(seed)
        for one in own:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Whatever the block draws leaves the global generators as they were.

    Distillation sets up a teacher, projections and statistics before the first step; a student
    trained with every coefficient at 0 has to see the same random numbers as without them.
    """
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
