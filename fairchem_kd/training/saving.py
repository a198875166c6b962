"""Checkpoints from which a training can go on as if it had not been interrupted.

Stock's are enough to start from, not to go on from: they hold no random states, and a kill while
one is written leaves none. What is added here stands under one more key of a stock checkpoint, and
knows no teacher.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage

from fairchem_kd.errors import UserError
from fairchem_kd.stock.gradient_forces import close_at_cutoff
from fairchem_kd.stock.softness import softness
from fairchem_kd.stock.trainer import StockTrainer
from fairchem_kd.training.from_direct import without_force_head
from fairchem_kd.training.interruption import Interruption
from fairchem_kd.training.resume import (
    STATE_FORMAT,
    STATE_KEY,
    check_format,
    check_same_run,
    random_states,
    read_student,
)
from fairchem_kd.training.softer import averages_for_stock, averages_for_training
from fairchem_kd.training.writing import checkpoints_written_with

#: What a checkpoint's state holds of a subclass; the name is that of the first one there was.
OWN_STATE = "distillation"


@dataclass
class Restart:
    """Where a training came from and how far it is, as far as going on depends on it."""

    asked: bool  #: for a run of this name, with ``--timestamp-id``
    loaded_from: str = ""
    softness: float | None = None  #: of the lengths of what was loaded
    state: dict[str, Any] | None = None  #: what the loaded file holds under `STATE_KEY`
    random_state: dict[str, Any] | None = None  #: to be set when the first batch has come
    scheduled_step: int = 0  #: the last step after which the scheduler took one
    saved_step: int = 0
    validated: dict[str, Any] | None = None  #: the last validated step, and its primary metric
    training: bool = False
    evaluating: bool = False


class SavingTrainer(StockTrainer):
    """Saves what a training needs to go on bit for bit, and loads it.

    Raises:
        UserError: a checkpoint of another run, or one that cannot be read or written.
    """

    ema: ExponentialMovingAverage | None
    step: int
    epoch: float

    def __init__(self, **stock: Any) -> None:
        self.restart = Restart(asked=stock.get("timestamp_id") is not None)
        super().__init__(**stock)
        self.interruption = Interruption(self.device)

    # -- what a subclass adds ---------------------------------------------------------------------

    def own_state(self) -> dict[str, Any] | None:
        """What has to be saved of it."""
        return None

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        """Go on from what was saved of it; None of a run that had none.

        Raises:
            UserError: it does not belong to this training.
        """
        if state is not None:
            raise UserError(
                f"--timestamp-id {self.timestamp_id}: that run distilled, and this trainer does "
                "not: give the config that it was started with, or start a new run."
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def save(
        self,
        metrics: Any = None,
        checkpoint_file: str = "checkpoint.pt",
        training_state: bool = True,
    ) -> str | None:
        """Stock's checkpoint, written aside and renamed, with our state under one more key.

        Raises:
            UserError: it cannot be written, e.g. for a full disk; the one before is whole then.
        """
        if self.interruption.answering:  # every rank has just saved; stock asks the first one again
            return self._own_checkpoint
        extra = {STATE_KEY: self._state()} if training_state else {}
        if training_state and self.ema:
            extra["ema"] = averages_for_stock(self.ema, self._unwrapped_model)
        try:
            with checkpoints_written_with(extra):
                path = super().save(metrics, checkpoint_file, training_state)
        except OSError as error:
            run = self.config["cmd"]["timestamp_id"]
            raise UserError(
                f"{checkpoint_file} of step {self.step} could not be written ({error}), and the "
                "one before it is kept: make room, then start the same command again with "
                f"--timestamp-id {run}."
            ) from error
        if training_state:
            self.restart.saved_step = self.step
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            OWN_STATE: self.own_state(),
            "random_states": random_states(gather=self.restart.training),
            "scheduler_stepped": self.restart.scheduled_step >= self.step,
            "validated": self.restart.validated,
            "steps_per_epoch": len(self.train_loader) if self.train_loader is not None else None,
        }

    def load_checkpoint(
        self,
        checkpoint_path: str,
        checkpoint: dict[str, Any] | None = None,
        inference_only: bool = False,
    ) -> None:
        """Stock's, from a file read without executing code."""
        own = self.restart.asked and self._is_own(checkpoint_path)
        if checkpoint is None:
            logging.info(f"Loading checkpoint from: {checkpoint_path}")
            checkpoint = read_student(checkpoint_path, own=own)
        if own:
            check_same_run(checkpoint["config"], self.config, self.timestamp_id)
        else:
            weights = self._unwrapped_model.state_dict()
            checkpoint = without_force_head(checkpoint, self.config, weights, checkpoint_path)
        checkpoint = averages_for_training(checkpoint, self._unwrapped_model)
        try:
            super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        except RuntimeError as error:  # torch's, with a line for each weight
            if "loading state_dict" not in str(error):
                raise
            first = next(iter(str(error).splitlines()[1:]), "").strip()
            raise UserError(
                f"--checkpoint {checkpoint_path}: its weights do not fit the model of this config "
                f"({first:.200}): give a checkpoint of that model, or the config's model as it was "
                "trained."
            ) from error
        if inference_only:
            return
        close_at_cutoff(self._unwrapped_model, self.ema)
        if self.ema_decay and self.ema is None:
            # Stock drops EMA where the file has none, e.g. for an exported student.
            self.ema = ExponentialMovingAverage(self.model.parameters(), self.ema_decay)
        self.restart.loaded_from = checkpoint_path
        self.restart.softness = softness(checkpoint["config"])
        self.restart.state = checkpoint.get(STATE_KEY)
        self.restart.saved_step = self.step if own else 0
        check_format(self.restart.state, checkpoint_path)

    @property
    def _own_checkpoint(self) -> str:
        return os.path.join(self.config["cmd"]["checkpoint_dir"], "checkpoint.pt")

    @property
    def continues_run(self) -> bool:
        """Whether what was loaded is this run's own, rather than a start for a new one."""
        return self.restart.loaded_from != "" and self._is_own(self.restart.loaded_from)

    def _is_own(self, path: str) -> bool:
        return os.path.abspath(path) == os.path.abspath(self._own_checkpoint)
