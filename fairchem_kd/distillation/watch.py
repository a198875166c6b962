"""Looks at a training's values as they are logged, and says once what a user would want to know."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

KNOWS_NOTHING = 0.9  # of a standardised feature loss, whose value is 1 for a guess of the mean
_LEARNED = 0.1  # the share of the training after which a term should have come below it
HEAVY = 3.0  # times the label loss that a weighted term may be without a word
_READINGS = 3  # over which the last of these is averaged


class Watch:
    """Warns of terms that teach nothing, and of those that drown the labels.

    Args:
        standardised: the terms whose value is 1 where nothing is known.
        last_step: of the training.
    """

    def __init__(self, standardised: Iterable[str], last_step: int) -> None:
        self.standardised = set(standardised)
        self.last_step = last_step
        self._read: list[Mapping[str, float]] = []
        self._begun: dict[str, int] = {}
        self._told: set[str] = set()

    def look(self, step: int, values: Mapping[str, float], label_loss: float) -> None:
        """Take in the means since the last time.

        Args:
            step: of the training.
            values: raw and weighted (``NAME_weighted``) values of the terms.
            label_loss: as it counts; 0 where the labels do not.
        """
        self._read = [*self._read[1 - _READINGS :], {**values, "": label_loss}]
        for name in self.standardised & values.keys():
            begun = self._begun.setdefault(name, step)
            if step - begun >= _LEARNED * self.last_step and values[name] > KNOWS_NOTHING:
                self._warn(
                    f"knows {name}",
                    f"{name} is still {values[name]:.2f} at step {step} of {self.last_step}, where "
                    "1 is a guess of the mean: the student learns nothing of this feature. Another "
                    "layer (`fairchem-kd cka` shows which are alike), a larger coefficient, or no "
                    "such term.",
                )
        if len(self._read) < _READINGS:
            return
        labels = sum(one[""] for one in self._read)
        for name in values:
            term = name.removesuffix("_weighted")
            total = sum(one.get(name, 0.0) for one in self._read)
            if name.endswith("_weighted") and labels > 0 and total > HEAVY * labels:
                self._warn(
                    f"heavy {term}",
                    f"{term} counts {total / labels:.1f} times the labels' loss at step {step}: "
                    "the student follows the teacher more than its labels. If that is not meant, "
                    "give it a smaller coefficient.",
                )

    def _warn(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logging.warning(text)
