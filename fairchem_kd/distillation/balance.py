"""Weights of the terms that follow the training, on top of coefficients and schedules.

``gradient_norm``: each term's gradient is as long as that of the labels' loss, times ``target``,

    f <- momentum f + (1 - momentum) target |grad labels| / |grad c L|

measured every few steps (after Wang, Teng and Perdikaris, SIAM J. Sci. Comput. 43, 2021).
``uncertainty``: of ``exp(-s) c L + s`` the optimum in s (Kendall, Gal and Cipolla, CVPR 2018),
found by gradient descent on s beside the training, with ``f = exp(-s)``, so that each weighted term
tends to 1 however its scale changes.

Both are functions of values that all ranks share, so that all ranks have the same factors; what was
learned stands in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fairchem_kd.distillation.gradients import NORM
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.schema import option

WHERE = "task.distillation.balance"
GRADIENTS, UNCERTAINTY = "gradient_norm", "uncertainty"
#: Each kind with the options that are its own.
OWN = {GRADIENTS: ("every", "target", "momentum"), UNCERTAINTY: ("rate",)}
KINDS = tuple(OWN)
#: What follows the name of a term in logs and records.
FACTOR = "balance"


@dataclass
class BalanceOptions:
    """How terms are weighed against each other as the training goes; ``kind`` alone will do."""

    kind: str = option(
        GRADIENTS,
        choices=KINDS,
        help="gradient_norm: gradients as long as the labels'; uncertainty: weighted terms near 1",
    )
    every: int = option(
        20, ge=1, help="gradient_norm: steps from one look at gradients to the next"
    )
    target: float = option(
        1.0, gt=0, help="gradient_norm: a term's gradient over the labels', in length"
    )
    momentum: float = option(0.9, ge=0, le=0.999, help="gradient_norm: how much a factor keeps")
    rate: float = option(0.01, gt=0, le=1, help="uncertainty: step size on the log of the scale")
    limit: float = option(1000.0, gt=1, help="a factor lies between one over this and this")

    def __post_init__(self) -> None:
        defaults = {one.name: one.default for one in fields(self)}
        for kind, own in OWN.items():
            for name in own:
                if kind != self.kind and getattr(self, name) != defaults[name]:
                    raise UserError(
                        f"{WHERE}.{name} is of {kind}, and the kind is {self.kind}: take one of "
                        "the two out."
                    )


def balance_options(given: str | BalanceOptions | None) -> BalanceOptions | None:
    """The options, which a config may give by their kind alone.

    Raises:
        UserError: there is no such kind.
    """
    if not isinstance(given, str):
        return given
    if given not in KINDS:
        raise UserError(
            f"{WHERE} cannot be '{given}'{did_you_mean(given, KINDS)}: it is gradient_norm or "
            "uncertainty, or a mapping with one of them as its kind."
        )
    return BalanceOptions(given)


class Balance:
    """The factors of one training's terms.

    Args:
        options: what the config gave.
        terms: by name.
        device: where the factors are.
    """

    def __init__(self, options: BalanceOptions, terms: Iterable[str], device: torch.device) -> None:
        self.options = options
        self._logs = {name: torch.zeros((), dtype=torch.float64).to(device) for name in terms}
        self._seen = dict.fromkeys(self._logs, False)  # whether a term was looked at yet
        # whether its gradient was beside one of the labels, who may begin later: on the device
        self._weighed = {
            name: torch.zeros_like(log, dtype=torch.bool) for name, log in self._logs.items()
        }
        self._most = math.log(options.limit)

    def factors(self, terms: Iterable[str]) -> Tensor:
        """The factors of terms, ``(T,)``, float64."""
        return torch.stack([self._logs[name] for name in terms]).exp()

    def of(self, term: str) -> Tensor:
        """The factor of one term, ``()``."""
        return self._logs[term].exp()

    def looks(self, step: int, running: Iterable[str]) -> bool:
        """Whether it wants gradients at a step: in turn, and where a term runs the first time."""
        if self.options.kind != GRADIENTS:
            return False
        return step % self.options.every == 0 or not all(self._seen[name] for name in running)

    def learn_gradients(
        self, found: Mapping[str, Tensor], labels: str, scheduled: Mapping[str, float]
    ) -> None:
        """Take in lengths of gradients, of terms as they count.

        Args:
            found: ``NAME_grad_norm`` of terms and of the labels (`gradients.compared_gradients`).
            labels: the name of the labels' loss.
            scheduled: what the schedules multiply each term by at this step.
        """
        own = found[f"{labels}_{NORM}"].double()
        for name, scale in scheduled.items():
            norm = found.get(f"{name}_{NORM}")
            if norm is None or scale <= 0:
                continue
            norm = norm.double() / scale
            ratio = self.options.target * own / norm.clamp(min=1e-300) * self.of(name)
            keep = self.options.momentum * self._weighed[name]
            new = (keep * self.of(name) + (1 - keep) * ratio).log()
            there = self._set(name, new, (norm > 0) & (own > 0))
            self._weighed[name] = self._weighed[name] | there
            self._seen[name] = True

    def learn_values(self, values: Mapping[str, Tensor]) -> None:
        """Take in the terms' values ``()`` over all ranks, times their coefficients."""
        if self.options.kind != UNCERTAINTY:
            return
        for name, value in values.items():
            value = value.detach().double()
            log = self._logs[name]
            down = self.options.rate * (1 - log.exp() * value)  # s falls, f rises where f L < 1
            self._set(name, log + down.clamp(-1.0, 1.0), value > 0)

    def _set(self, name: str, log: Tensor, where: Tensor) -> Tensor:
        """Take a factor's log where that is one, ``()``; returns whether it is."""
        there = where & torch.isfinite(log)
        kept = self._logs[name]
        self._logs[name] = torch.where(there, log.clamp(-self._most, self._most), kept)
        return there

    def state_dict(self) -> dict[str, object]:
        return {
            "logs": {k: v.cpu() for k, v in self._logs.items()},
            "seen": dict(self._seen),
            "weighed": {k: v.cpu() for k, v in self._weighed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Go on with what was learned."""
        for name, log in self._logs.items():
            kept = state["logs"].get(name)
            if isinstance(kept, Tensor):
                self._logs[name] = kept.to(log)
                self._seen[name] = bool(state["seen"].get(name))
                weighed = state.get("weighed", state["seen"]).get(name)  # files of before have none
                self._weighed[name] = torch.full_like(self._weighed[name], bool(weighed))
