"""A training that goes on after any interruption as if there had been none, bit for bit.

What a checkpoint has for it, `saving` writes and reads. A subclass with state of its own has the
hooks

    set_up -> (load_own_state) -> steps: run_model, values -> own_state, seen
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils

from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import refuse_wrong_forces
from fairchem_kd.random_state import random_state, set_random_state
from fairchem_kd.stock.gradient_forces import check_gradient_forces
from fairchem_kd.training.before import check_ranks, check_space, check_split
from fairchem_kd.training.checks import (
    check_finite,
    none_free,
    refuse_divergence,
    refuse_gradients,
    refuse_none_free,
    refuse_unlearned,
)
from fairchem_kd.training.interruption import Ask, Stopped, how_to_go_on
from fairchem_kd.training.owner import Owner
from fairchem_kd.training.progress import Progress
from fairchem_kd.training.ranks import refused_by_all
from fairchem_kd.training.records import Clock, Records
from fairchem_kd.training.resume import (
    check_same_steps,
    has_checkpoint,
    random_state_for,
    remove_leftovers,
)
from fairchem_kd.training.saving import OWN_STATE, SavingTrainer
from fairchem_kd.training.softer import begin_soft

if TYPE_CHECKING:
    from torch_geometric.data import Batch


#: Outputs of a batch's structures, in the student's normalised units.
Predict = Callable[["Batch"], dict[str, torch.Tensor]]


class RestartableTrainer(SavingTrainer):
    """Trains as stock does; its runs keep records, survive kills and go on with the same bits.

    Raises:
        UserError: data without labels, ranks that see different things, a checkpoint of another
            run or one that cannot be written.
    """

    def __init__(self, **stock: Any) -> None:
        self.records: Records | None = None
        self.progress: Progress | None = None
        self._none_free = False
        self.metrics: dict[str, Any] = {}  # stock has them from its first step on
        super().__init__(**stock)

    # -- what a subclass adds ---------------------------------------------------------------------

    def set_up(self) -> None:
        """Make what is there before the first step; leaves the global random states as they are."""

    def seen(self) -> dict[str, Any]:
        """What all ranks have to agree on beside config and data, by what a user calls it."""
        return {}

    def values(self) -> dict[str, float]:
        """Means since the last time, for the logs and records of the step."""
        return {}

    def run_model(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The outputs of the model on ``batch``."""
        return super()._forward(batch)

    @property
    def teacher_prediction(self) -> Predict | None:
        """What a teacher says of a batch, in the student's normalised units, if there is one."""
        return None

    def cost_in_words(self) -> str:
        """What the training took beside the time."""
        return ""

    # -- setting up -------------------------------------------------------------------------------

    def load_extras(self) -> None:
        super().load_extras()
        step_schedule = self.scheduler.step

        def step_and_note(*args: Any, **kwargs: Any) -> None:
            step_schedule(*args, **kwargs)
            self.restart.scheduled_step = self.step

        self.scheduler.step = step_and_note  # a resume has to know whether it was taken
        if self.device.type == "cpu":  # on a GPU that would wait for the device
            self.optimizer.register_step_pre_hook(
                lambda *_: refuse_gradients(self.model.parameters(), self.step)
            )

    def load_model(self) -> None:
        super().load_model()
        refuse_wrong_forces(self._unwrapped_model, "The student (model)")

    def check_labels(self) -> None:
        """Refuse data that losses, metrics and predictions cannot take; stock would fail later."""
        with refused_by_all():
            for split in ("train", "val", "test"):
                check_split(self, split)
            if "forces" in self.output_targets:
                check_gradient_forces(self._unwrapped_model, self.normalizers)

    def check_ranks(self) -> None:
        """Make sure that all ranks go on from the same, with the same data and config."""
        check_ranks(self, self.seen())

    def prepare(self) -> None:
        """Set up, and go on from the saved state where this run has one."""
        self.set_up()
        if self.continues_run:
            with refused_by_all():
                self.load_own_state((self.restart.state or {}).get(OWN_STATE))

    # -- training ---------------------------------------------------------------------------------

    def train(self, disable_eval_tqdm: bool = False) -> None:
        if self.train_loader is None:
            raise UserError("dataset.train is missing: there are no structures to train on.")
        if self.scheduler.scheduler_type == "ReduceLROnPlateau" and self.val_loader is None:
            raise UserError(
                "optim.scheduler is ReduceLROnPlateau, which needs a dataset.val; give one, or "
                "choose another scheduler."
            )
        self.restart.training = True
        began = Clock()
        with self.interruption, self._owned():
            self._resume_own_run()
            if self.continues_run:
                check_same_steps(
                    self.restart.state,
                    step=self.step,
                    epoch=self.epoch,
                    steps=len(self.train_loader),
                    run=self.timestamp_id,
                )
            elif self.restart.loaded_from and self.step >= self.last_step:
                self._start_anew()
            if self.restart.loaded_from:
                before, path = self.restart.softness, self.restart.loaded_from
                begin_soft(self._unwrapped_model, self.ema, before, self.config, path)
            self.check_ranks()
            self.check_labels()
            with refused_by_all():
                check_space(self)
            self.prepare()
            self.warn_of_no_evaluation()
            if distutils.is_master() and not self.is_debug:
                self.records = Records(self.config["cmd"]["checkpoint_dir"], began)
                self.records.write("config", step=self.step, config=self.config)
            self.interruption.polled = True
            shown = distutils.is_master() and not self.is_debug
            self.progress = Progress(self.step, self.last_step, shown=shown)
            if self.restart.state is not None:
                self._finish_resumed_step(self.restart.state, disable_eval_tqdm)
            super().train(disable_eval_tqdm=disable_eval_tqdm)
            if self.records is not None:
                self.records.write("end", step=self.step, epoch=self.epoch)
            self.progress.close()
        self.restart.training = False

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Within the block the run's folder belongs to this training; a collective."""
        with ExitStack() as stack:
            with refused_by_all():
                if distutils.is_master() and not self.is_debug:
                    stack.enter_context(Owner(self.config["cmd"]["checkpoint_dir"]))
            yield

    def _forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        check_finite(batch, tuple(self.output_targets))
        self._none_free = none_free(batch)
        if self.restart.evaluating:
            if self.interruption.asked() is Ask.LEAVE:
                self.interruption.leave()  # this step has been saved; it will be evaluated again
            if self.interruption.stopped:
                self._stop()
        if self.model.training and self.restart.random_state is not None:
            # as it was at this step of the interrupted run
            set_random_state(self.restart.random_state)
            self.restart.random_state = None
        try:
            return self.run_model(batch)
        except RuntimeError as error:
            refuse_unlearned(self.model, error)
            raise

    def _compute_loss(self, out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        if self._none_free:
            refuse_none_free(batch, self.output_targets, "train_on_free_atoms")
        return super()._compute_loss(out, batch)

    def _compute_metrics(self, out: Any, batch: Batch, evaluator: Any, metrics: Any = None) -> Any:
        if self._none_free:
            refuse_none_free(batch, self.output_targets, "eval_on_free_atoms")
        metrics = super()._compute_metrics(out, batch, evaluator, metrics)
        if self.model.training and self._is_printed:
            for name, value in self.values().items():
                metrics[name] = {"metric": value, "total": value, "numel": 1}
        return metrics

    @property
    def _is_printed(self) -> bool:
        return self.step % self.config["cmd"]["print_every"] == 0

    def _backward(self, loss: torch.Tensor) -> None:
        # Here, where the host has just read the loss: ranks that agree wait for nothing else.
        asked = self.interruption.asked()
        refuse_divergence(self.metrics, self.step)
        super()._backward(loss)
        if self.progress is not None:
            self.progress.advance(self.step)
        if self.records is not None and self._is_printed:
            metrics = {name: metric["metric"] for name, metric in self.metrics.items()}
            rate = self.scheduler.get_lr()
            self.records.write("train", step=self.step, epoch=self.epoch, lr=rate, metrics=metrics)
        if asked is not Ask.NOTHING:
            self.save()
        if asked is Ask.LEAVE:
            self.interruption.leave()
        if self.interruption.stopped:
            self._stop()

    def _stop(self) -> None:
        """Save this step where that has not been done, and stop; after Ctrl-C."""
        if self.restart.saved_step != self.step:
            if self.ema is not None and self.restart.evaluating and self.ema.collected_params:
                self.ema.restore()  # an evaluation has put the averages in place of the weights
            self.save()
        raise Stopped(
            f"stopped after step {self.step} of {self.last_step}; to go on: "
            f"{how_to_go_on(self.timestamp_id)}"
        )

    # -- evaluation -------------------------------------------------------------------------------

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> dict[str, Any]:
        with self._in_evaluation():
            metrics = super().validate(split=split, disable_tqdm=disable_tqdm)
        more = self.values()
        if more and self.logger is not None:
            self.logger.log(more, step=self.step, split=split)
        values = {name: metric["metric"] for name, metric in metrics.items()} | more
        if self.records is not None:
            self.records.write(split, step=self.step, epoch=self.epoch, metrics=values)
        return metrics

    def update_best(
        self, primary_metric: str, val_metrics: dict[str, Any], disable_eval_tqdm: bool = True
    ) -> None:
        with self._in_evaluation():  # a new best one predicts the test set
            super().update_best(primary_metric, val_metrics, disable_eval_tqdm=disable_eval_tqdm)
        metric = float(val_metrics[primary_metric]["metric"])
        self.restart.validated = {"step": self.step, "metric": metric}

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        """Within the block a training can leave at any batch, since its step has been saved."""
        if not self.restart.training:
            yield
            return
        if self.interruption.held and self.restart.saved_step != self.step:
            self.save()
        self.restart.evaluating = True
        try:
            yield
        finally:
            self.restart.evaluating = False

    # -- going on ---------------------------------------------------------------------------------

    def _resume_own_run(self) -> None:
        """Go on from this run's own checkpoint, if it was asked for by name and there is one."""
        if not self.restart.asked:
            return
        if distutils.is_master():
            remove_leftovers(self._own_checkpoint)
        if self.continues_run:
            return
        if has_checkpoint(self._own_checkpoint):
            # It goes before the one that --checkpoint names: a requeued run goes on.
            self.load_checkpoint(self._own_checkpoint)
        else:
            logging.info(f"{self.timestamp_id} has no checkpoint: starting from the beginning")

    def _start_anew(self) -> None:
        """Start a new run with the weights of one that has ended: no step of it is left.

        Stock would train no step, and leave nothing.
        """
        logging.info(
            f"{self.restart.loaded_from} is of a training that has ended (step {self.step}): this "
            "one starts at step 0 with its weights, and with an optimiser, a schedule and averages "
            "of its own."
        )
        self.step, self.epoch = 0, 0
        self.best_val_metric = None
        self.primary_metric = None  # stock begins its search anew
        self.restart.state = None
        self.restart.scheduled_step = self.restart.saved_step = 0
        self.load_optimizer()
        self.load_extras()

    def _finish_resumed_step(self, state: dict[str, Any], disable_eval_tqdm: bool) -> None:
        """What the interrupted run had still to do after its save, in stock's order."""
        optim = self.config["optim"]
        set_random_state(random_state_for(state, distutils.get_rank()))
        eval_due = self.step % optim.get("eval_every", len(self.train_loader)) == 0
        self.restart.validated = state["validated"]
        validated = (
            self.restart.validated is not None and self.restart.validated["step"] == self.step
        )
        if (
            eval_due
            and self.val_loader is not None
            and not (validated or state["scheduler_stepped"])
        ):
            metrics = self.validate(split="val", disable_tqdm=disable_eval_tqdm)
            self.update_best(str(self.primary_metric), metrics, disable_eval_tqdm=disable_eval_tqdm)
        if not state["scheduler_stepped"]:
            if self.scheduler.scheduler_type != "ReduceLROnPlateau":
                with warnings.catch_warnings():
                    # The optimiser has taken its step, but in the interrupted run.
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    self.scheduler.step()
            elif eval_due and self.restart.validated is not None:
                self.scheduler.step(metrics=self.restart.validated["metric"])
        self.restart.scheduled_step = self.step
        self.restart.state = None
        if self.step % len(self.train_loader) != 0:
            # In mid-epoch the loader is opened once more than in an uninterrupted run, which draws
            # a random number: the state goes back to this one when the first batch has come.
            self.restart.random_state = random_state()
