"""The terms of a batch in one number, over the elements of all ranks, and what is noted of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fairchem_kd.distillation.balance import FACTOR, Balance
from fairchem_kd.distillation.gradients import DiagnosticOptions, gradients_of_terms
from fairchem_kd.distillation.values import Values
from fairchem_kd.losses import Loss, Part
from fairchem_kd.training.ranks import all_sum, world_size

#: The loss of the labels, weighted as it counts.
LABEL_LOSS = "label_loss"


class Summing:
    """The weighted sum of terms, each a mean over the elements of all ranks.

    Args:
        terms: by name.
        student: whose parameters gradients are looked at.
        last_step: the last optimiser step of the training, where schedules end.
        diagnostics: when each term's gradient is held beside the labels'.
        balance: of the terms, if they are balanced.
        values: where values are noted.
        device: of what is summed.
    """

    def __init__(
        self,
        terms: Mapping[str, Loss],
        student: nn.Module,
        *,
        last_step: int,
        diagnostics: DiagnosticOptions,
        balance: Balance | None,
        values: Values,
        device: torch.device,
    ) -> None:
        self.terms = terms
        self.student = student
        self.last_step = last_step
        self.diagnostics = diagnostics
        self.balance = balance
        self.values = values
        self.device = device

    def running(self, step: int) -> dict[str, Loss]:
        """The terms that count at a step, by their schedules."""
        return {n: t for n, t in self.terms.items() if t.schedule.runs(step, self.last_step)}

    def __call__(
        self,
        parts: Mapping[str, tuple[float, Part]],
        noted: Mapping[str, Part],
        step: int,
        labels: Tensor | None,
    ) -> Tensor:
        """``()``: one all-reduce carries the counts and the sums of all parts.

        It is multiplied by the number of ranks, because DistributedDataParallel averages gradients
        over them.

        Args:
            parts: with the weight within its term, by the term's name, then a dot and its own.
            noted: what counts nothing, for the records.
            step: of the training.
            labels: the labels' loss ``()`` as it counts, which is noted alone.
        """
        weighted = {
            name: (self._weight(name, step) * own, part) for name, (own, part) in parts.items()
        }
        noted = dict(noted)
        if labels is not None:
            noted = {LABEL_LOSS: Part("", 1.0, labels.detach(), 1)} | noted
        summed = [*(part for _, part in weighted.values()), *noted.values()]
        if not summed:  # no term runs, or none of them can say anything
            self.values.end_step()
            return torch.zeros((), device=self.device)
        totals = _stacked([part.total for part in summed])
        # a plain sum over ranks: their counts add up to one
        counts = self._counts([1.0 / world_size() if p.count is None else p.count for p in summed])
        counts, means = all_sum(torch.cat([counts, totals.detach()])).chunk(2)
        counts = counts.clamp(min=1.0)
        means = means / counts
        weights = [weight for weight, _ in weighted.values()]
        weight = torch.tensor(weights, dtype=torch.float64).to(self.device, non_blocking=True)
        if self.balance is not None and parts:
            weight = self._balanced(self.balance, weight, means, list(parts), step)
        own = slice(len(parts))
        self._note(parts, means[own], weight)
        self.values.note(tuple(noted), means[len(parts) :])
        self.values.end_step()
        losses = weight * totals[own] * (world_size() / counts[own])
        if labels is not None and labels.requires_grad:
            self._look_at_gradients(dict(zip(parts, losses, strict=True)), labels, step)
        return losses.sum().float()

    def _weight(self, name: str, step: int) -> float:
        """What the term to which a part belongs counts at a step."""
        term = self.terms[_term_of(name)]
        return term.coefficient * term.schedule.factor(step, self.last_step)

    def _balanced(
        self, balance: Balance, weights: Tensor, means: Tensor, names: Sequence[str], step: int
    ) -> Tensor:
        """Weights of parts ``(P,)`` times the factors of their terms, which learn from the means.

        A validation learns nothing.
        """
        terms = [_term_of(name) for name in names]
        factors = balance.factors(terms)
        values: dict[str, Tensor] = {}
        for term, value in zip(terms, (weights * means[: len(terms)]).unbind(), strict=True):
            scheduled = self.terms[term].schedule.factor(step, self.last_step)
            own = value / scheduled if scheduled > 0 else 0.0 * value
            values[term] = values[term] + own if term in values else own
        noted = [f"{term}_{FACTOR}" for term in values]
        self.values.note(noted, balance.factors(values))
        if self.student.training:
            balance.learn_values(values)
        return weights * factors

    def _look_at_gradients(self, losses: dict[str, Tensor], labels: Tensor, step: int) -> None:
        """Compare each term's gradient with the labels', where someone wants to know."""
        running = self.running(step)
        due = self.diagnostics.due(step)
        balancing = self.balance is not None and self.balance.looks(step, running)
        if not (due or balancing):
            return
        found = gradients_of_terms(losses, (LABEL_LOSS, labels), self.student)
        if due:
            for name, value in found.items():
                self.values.note_now(name, value)
        if self.balance is not None and balancing:
            scheduled = {n: t.schedule.factor(step, self.last_step) for n, t in running.items()}
            self.balance.learn_gradients(found, LABEL_LOSS, scheduled)

    def _note(self, names: Iterable[str], values: Tensor, weights: Tensor) -> None:
        """Note each part's raw and weighted value."""
        both = tuple(full for name in names for full in (name, f"{name}_weighted"))
        self.values.note(both, torch.stack([values, weights * values], dim=1).flatten())

    def _counts(self, counts: Sequence[Tensor | float]) -> Tensor:
        """``(n,)``, float64; in one go to the device where none of them is there."""
        numbers = [0.0 if isinstance(count, Tensor) else count for count in counts]
        known = torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)
        if not any(isinstance(count, Tensor) for count in counts):
            return known
        return torch.stack(
            [c.double() if isinstance(c, Tensor) else k for c, k in zip(counts, known, strict=True)]
        )


def _term_of(part: str) -> str:
    """The name of the term of a part: ``vanilla`` of ``vanilla.energy``."""
    return part.partition(".")[0]


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """``(n,)``, float64, of numbers ``()``; in one go where they are of one type."""
    if len({value.dtype for value in values}) == 1:
        return torch.stack(list(values)).double()
    return torch.stack([value.double() for value in values])
