"""Random states survive a file without pickled objects, and set-up leaves them alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from fairchem_kd.random_state import isolated_random_state, random_state, set_random_state


def draw() -> list[float]:
    legacy = np.random.normal()  # noqa: NPY002  (fairchem and torch's loaders use the global one)
    return [random.random(), random.gauss(0, 1), legacy, *torch.rand(3).tolist()]


def test_a_saved_state_gives_the_same_draws(tmp_path: Path) -> None:
    draw()  # leaves a cached Gaussian behind in the Python and NumPy generators
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_an_isolated_block_leaves_no_trace() -> None:
    state = random_state()
    expected = draw()
    set_random_state(state)
    with isolated_random_state():
        draw()
    assert draw() == expected
