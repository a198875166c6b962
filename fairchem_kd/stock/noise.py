"""What stock fairchem says that is of no use to a user: in logs, and in warnings."""

from __future__ import annotations

import logging
import os
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


#: In the environment where ``-v`` was given.
VERBOSE = "FAIRCHEM_KD_VERBOSE"
_OF_STOCK = "%(pathname)s"  # in the format of the handlers that stock sets up


class _Plain(logging.Formatter):
    """The time and the message; that it is a warning or an error is said in front of it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        time, _, message = text.partition(" ")
        return f"{time} {record.levelname.lower()}: {message}"


def plain_logs() -> None:
    """Log without file names, and without stock's dump of the whole config; not with ``-v``.

    A run's ``records.jsonl`` holds its config.
    """
    if os.environ.get(VERBOSE):
        return
    for handler in logging.getLogger().handlers:
        format_of = getattr(handler.formatter, "_fmt", None)
        if isinstance(format_of, str) and _OF_STOCK in format_of:
            handler.setFormatter(_Plain("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
            handler.addFilter(_is_told)


#: What stock logs that tells a user nothing: by module and function, and what the line begins with.
_UNTOLD = (
    ("base_trainer", "__init__", ""),  # the whole config
    ("base_trainer", "load_optimizer", ""),  # every parameter without weight decay
    ("data_parallel", "", ""),  # samplers, and that one rank has nothing to balance
    ("logger", "", "log_summary for"),
    ("utils", "", "Project root"),
    ("utils", "", "Setting env"),
    ("_cli", "", "Running in local mode"),
    ("_load_utils", "", "normalizers checkpoint for"),
    ("base_trainer", "", "Normalization values for output"),  # which the config holds
    ("utils", "", "Overwritten config parameters"),  # as configs that include others do
)


def _is_told(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(
        record.module == module and function in ("", record.funcName) and message.startswith(begins)
        for module, function, begins in _UNTOLD
    )


@contextmanager
def without_the_untold() -> Iterator[None]:
    """Within the block stock logs none of that, where no handler of its own is set up either."""
    root = logging.getLogger()  # stock logs to it by itself
    told = os.environ.get(VERBOSE)
    if not told:
        root.addFilter(_is_told)
    try:
        yield
    finally:
        if not told:
            root.removeFilter(_is_told)


#: Warnings of stock fairchem's code that a user of our commands can do nothing about.
NOISE = (
    r"'PaiNN\w*\.jittable' is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Grad strides do not match bucket view strides",  # of a layer with one output
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
