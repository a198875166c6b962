"""Where a training is, for who waits for it: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

_FIRST = 10  # steps after which the time that is left can be told
_EVERY_S = 30.0  # between two lines, ...
_SHARE = 0.02  # ... and this share of the whole training, where that is longer


class Progress:
    """Says how far a training is and how long it will take.

    Args:
        first: the steps that were taken before.
        last: the last step of the training.
        shown: false where nobody is to be told, as on other ranks than the first.
    """

    def __init__(self, first: int, last: int, *, shown: bool = True) -> None:
        self.first, self.last, self.shown = first, last, shown
        self._began = self._told = time.monotonic()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=last,
                initial=first,
                desc="training",
                unit="step",
                leave=False,
                file=sys.stderr,
            )

    def advance(self, step: int) -> None:
        """Tell that a step was taken."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            return
        taken, now = step - self.first, time.monotonic()
        if taken < _FIRST or step >= self.last:
            return
        each = (now - self._began) / taken
        due = max(_EVERY_S, _SHARE * each * (self.last - self.first))
        if taken == _FIRST or now - self._told >= due:
            self._told = now
            left = in_words(each * (self.last - step))
            cost = f", {1e3 * each:.0f} ms a step" if taken == _FIRST else ""
            logging.info(f"step {step}/{self.last}, {step / self.last:.1%}{cost}, {left} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def in_words(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``2.3 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
