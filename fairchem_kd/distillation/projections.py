"""The optimiser of what only distillation trains: the projections, apart from the student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fairchem_kd.training.ranks import average_gradients

if TYPE_CHECKING:
    from fairchem_kd.distillation.config import ProjectionOptim


class Projections:
    """Steps the parameters of the loss terms, if they have any, with AdamW.

    Args:
        parameters: those of the terms.
        options: what the config gives.
        learning_rate: where it gives none.
        clip_grad_norm: where it gives none.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        options: ProjectionOptim,
        *,
        learning_rate: float,
        clip_grad_norm: float | None,
    ) -> None:
        self.learning_rate = options.lr or learning_rate
        self.clip_grad_norm = options.clip_grad_norm or clip_grad_norm
        self.weight_decay = options.weight_decay
        self.parameters = list(parameters)
        self.optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(
                self.parameters,
                self.learning_rate,
                weight_decay=self.weight_decay,
                fused=self.parameters[0].device.type in ("cpu", "cuda"),  # one kernel, not dozens
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters:  # as the optimiser's own, for less than a loss costs
            parameter.grad = None

    def step(
        self,
        rate: float,
        scaler: torch.amp.GradScaler | None,
        trained: Sequence[nn.Parameter],
    ) -> None:
        """Step the projections: gradients averaged over ranks, unscaled, clipped by themselves.

        Args:
            rate: the student's learning rate over its initial one.
            scaler: the AMP scaler with which the loss was scaled.
            trained: the parameters of the terms that count at this step. The others have no
                gradient, and averaging would make one of zeros, by which AdamW goes on.
        """
        if self.optimizer is None:
            return
        average_gradients(trained)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
        if scaler is not None:
            scaler.step(self.optimizer)  # the trainer updates the scaler after the student's step
        else:
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any] | None:
        return self.optimizer.state_dict() if self.optimizer is not None else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state, with the weight decay of now."""
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(state)
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.weight_decay
