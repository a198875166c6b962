"""What every test shares: one thread, signals as usual, the environment as it was."""

from __future__ import annotations

import gc
import os
import signal

# Before torch is imported; inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

torch.set_num_threads(1)

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What these assert is told as fully as what a test itself does.
pytest.register_assert_rewrite("configs", "edge_sums", "published", "sweeps", "terms", "trainings")


def pytest_collection_finish() -> None:
    """Leave what has been imported out of collections of garbage, of which tests make hundreds.

    Half a million objects that stay take a quarter of a second each time.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries complain of what is left when Python ends."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, and skip what needs a GPU where there is none.

    Files are given to workers as they come: long ones at the end would leave the others idle.
    """
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
