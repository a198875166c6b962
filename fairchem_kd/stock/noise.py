"""What stock fairchem says that is of no use to a user: in logs, and in warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Within the block, nothing up to ``level`` is logged: by default errors alone are."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


#: Warnings of stock fairchem's code that a user of our commands can do nothing about.
NOISE = (
    r"'PaiNN\w*\.jittable' is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def drop_noise() -> None:
    """Show none of these warnings from here on."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


@contextmanager
def without_noise() -> Iterator[None]:
    """Within the block, none of these warnings is shown."""
    with warnings.catch_warnings():
        drop_noise()
        yield
