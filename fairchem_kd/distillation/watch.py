"""Looks at a training's values as they are logged, and says once what a user would want to know."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from fairchem_kd.errors import UserError

KNOWS_NOTHING = 0.9  # of a standardised feature loss, whose value is 1 for a guess of the mean
_LEARNED = 0.1  # the share of the training after which a term should have come below it
HEAVY = 3.0  # times the label loss that a weighted term may be without a word
MOST_UNTRUSTED = 0.5  # of the structures so far
SURE = 10  # steps before a share of untrusted structures counts that is not all
_READINGS = 3  # over which the last of these is averaged


class Watch:
    """Warns of terms that teach nothing and those that drown the labels; ends what is in vain.

    Args:
        standardised: the terms whose value is 1 where nothing is known.
        last_step: of the training.
        asked: the terms to which the config gives a weight of its own, however large.
    """

    def __init__(
        self, standardised: Iterable[str], last_step: int, asked: Iterable[str] = ()
    ) -> None:
        self.standardised, self.asked = set(standardised), set(asked)
        self.last_step = last_step
        self._untrusted: list[float] = []  # shares, between two lines of the log
        self._read: list[Mapping[str, float]] = []
        self._begun: dict[str, int] = {}
        self._told: set[str] = set()
        self._labels_alone: dict[str, float] = {}  # the best errors before distillation began
        self._began_to_distil = 0  # the step of the first validation after it had

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
            if term.partition(".")[0] in self.asked:
                continue
            total = sum(one.get(name, 0.0) for one in self._read)
            if name.endswith("_weighted") and labels > 0 and total > HEAVY * labels:
                self._warn(
                    f"heavy {term}",
                    f"{term} counts {total / labels:.1f} times the labels' loss at step {step}: "
                    "the student follows the teacher more than its labels. If that is not meant, "
                    "give it a smaller coefficient.",
                )

    def untrusted(self, step: int, share: float) -> None:
        """Take in the share of structures for which the teacher's word did not count.

        Raises:
            UserError: it has been most of them so far.
        """
        self._untrusted.append(share)
        share = sum(self._untrusted) / len(self._untrusted)
        if share == 1.0 or (share > MOST_UNTRUSTED and step >= SURE):
            raise UserError(
                f"Step {step}: of {share:.0%} of the structures the teacher says "
                "NaN or infinity, so that it teaches little: take structures like those that it "
                "was trained on, or another teacher."
            )

    def validated(
        self, step: int, metrics: Mapping[str, float], *, distilling: bool, names: Iterable[str]
    ) -> None:
        """Take in a validation: what was better before distillation began is worth a word.

        Args:
            step: of the training.
            metrics: by name.
            distilling: some term runs.
            names: of the metrics that are errors.
        """
        known = {name: metrics[name] for name in names if name in metrics}
        if not distilling and not self._began_to_distil:
            for name, value in known.items():
                self._labels_alone[name] = min(value, self._labels_alone.get(name, value))
        if not distilling:
            return
        self._began_to_distil = self._began_to_distil or step
        if step - self._began_to_distil < _LEARNED * self.last_step:
            return
        for name, value in known.items():
            before = self._labels_alone.get(name)
            if before is not None and value > before:
                self._warn(
                    f"worse {name}",
                    f"{name} is {value:.4g} at step {step}, and was {before:.4g} with the labels "
                    "alone, before distillation began: the teacher makes this student worse. "
                    "Smaller coefficients, or a `stop` in their schedules.",
                )

    def _warn(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logging.warning(text)
