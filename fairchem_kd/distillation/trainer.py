"""DistillationTrainer: stock OCPTrainer, and what distillation adds to it.

The training loop, evaluation, normalisers, EMA, logging and checkpoints are fairchem's. A step goes

    batch -> student, its features tapped -> label loss (stock)
          -> teacher (frozen)             -> distillation losses -> total -> stock backward

where structures without labels and rattled copies join the batch before both models, and the
projections take their own optimiser step right after the student's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.modules.exponential_moving_average import ExponentialMovingAverage
from fairchem.core.trainers import OCPTrainer

from fairchem_kd.data.build import ensure_built
from fairchem_kd.distillation.companions import Companions, Rattler, UnlabelledLoader
from fairchem_kd.distillation.companions.join import labelled_part
from fairchem_kd.distillation.config import parse_distillation, refuse_graph_parallel
from fairchem_kd.distillation.terms import Distillation
from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.features.wrappers import stock_model_config
from fairchem_kd.machine import flush_denormals, flush_worker
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state, random_state, set_random_state
from fairchem_kd.stock.datasets import with_own_databases
from fairchem_kd.stock.trainer import fresh_timestamp, with_primary_metric
from fairchem_kd.training.checks import check_finite, check_labels
from fairchem_kd.training.interruption import Ask, Interruption
from fairchem_kd.training.ranks import (
    check_same_on_ranks,
    file_seen,
    refused_by_all,
    seen_by_rank,
)
from fairchem_kd.training.records import Records
from fairchem_kd.training.restartable import checkpoints_written_with
from fairchem_kd.training.resume import (
    STATE_FORMAT,
    STATE_KEY,
    check_format,
    check_same_run,
    check_same_steps,
    has_checkpoint,
    random_state_for,
    random_states,
    read_student,
    remove_leftovers,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from torch_geometric.data import Batch

    from fairchem_kd.features import Captured


@registry.register_trainer("distillation")
class DistillationTrainer(OCPTrainer):
    """Trains a stock student on its labels and on the hidden features of a teacher.

    Configured by ``task.distillation``
    (:class:`fairchem_kd.distillation.config.DistillationConfig`); every
    other argument is OCPTrainer's. Its checkpoints are stock checkpoints of the student, with one
    more key for what only distillation needs. Validation and prediction run the student alone.

    Raises:
        UserError: a wrong config, dataset, teacher or pairing, before training starts.
    """

    ema: ExponentialMovingAverage | None

    def __init__(self, task: dict[str, Any], model: dict[str, Any], **stock: Any) -> None:
        self.distillation_config = parse_distillation(task)
        refuse_graph_parallel(stock.get("gp_gpus"))
        ensure_built({"dataset": stock.get("dataset") or {}, "task": task})
        self.distillation: Distillation | None = None
        self.records: Records | None = None
        self._loaded_from = ""
        self._validating = False
        self._asked_to_resume = stock.get("timestamp_id") is not None
        self._run_dir = stock.get("run_dir") or os.getcwd()
        self.companions: Companions | None = None
        self._distilled: tuple[Batch, dict[str, torch.Tensor], Captured] | None = None
        self._resumed: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None
        self._scheduled_step = self._saved_step = 0
        self._validated: dict[str, Any] | None = None
        self._training = self._evaluating = False
        if self.distillation_config.flush_denormal and not _runs_on_cuda(stock):
            flush_denormals()
        super().__init__(task=task, model=stock_model_config(model), **stock)
        self.interruption = Interruption(self.device)

    # -- setting up -------------------------------------------------------------------------------

    def _get_timestamp(self, device: torch.device, suffix: str | None) -> str:
        """A run folder of this run's own; stock's clock has a granularity of 128 s."""
        return fresh_timestamp(self._run_dir, device, suffix, claim=not self.is_debug)

    def load_model(self) -> None:
        try:
            super().load_model()
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise UserError(f"model has a key that the model does not know: {error}.") from error

    def get_dataloader(self, dataset: Any, sampler: Any, workers: int | None = None) -> DataLoader:
        loader = super().get_dataloader(dataset, sampler, workers)
        flush = self.distillation_config.flush_denormal and self.device.type == "cpu"
        return with_own_databases(loader, flush_worker if flush else None)

    def load_extras(self) -> None:
        super().load_extras()
        self.optimizer.register_step_post_hook(self._step_projections)
        step_schedule = self.scheduler.step

        def step_and_note(*args: Any, **kwargs: Any) -> None:
            step_schedule(*args, **kwargs)
            self._scheduled_step = self.step

        self.scheduler.step = step_and_note  # a resume has to know whether it was taken

    def check_labels(self) -> None:
        """Refuse data without the labels that the losses are for; stock would fail in a step."""
        targets = [name for name, _ in self.loss_functions]
        for split, loader in (("train", self.train_loader), ("val", self.val_loader)):
            if loader is not None and len(loader.dataset) > 0:
                check_labels(loader.dataset[0], targets, f"dataset.{split}")

    def load_task(self) -> None:
        self.config["evaluation_metrics"] = with_primary_metric(
            self.config.get("evaluation_metrics"), self.config["outputs"]
        )
        super().load_task()

    def _set_up_distillation(self) -> None:
        """Teacher, taps, terms and statistics; leaves the global random states as they were."""
        config = self.distillation_config
        if not config.active_terms or config.teacher.checkpoint is None:
            if self._continues_run and (self._resumed or {}).get("distillation") is not None:
                raise UserError(
                    "task.distillation.losses is empty, but this run was started with losses: give "
                    "the same as then, or start a new run."
                )
            logging.info("No distillation losses: plain training")
            return
        with isolated_random_state():
            with refused_by_all():
                teacher = Teacher.from_checkpoint(
                    config.teacher.checkpoint,
                    trust=config.teacher.trust_checkpoint,
                    elements=config.teacher.elements,
                    device=self.device,
                )
                self.distillation = Distillation(
                    config,
                    self._unwrapped_model,
                    teacher,
                    Units(self.normalizers, self.elementrefs),
                    label_losses=self.loss_functions,
                    outputs=self.output_targets,
                    learning_rate=self.config["optim"]["lr_initial"],
                    clip_grad_norm=self.clip_grad_norm,
                    seed=self.config["cmd"]["seed"] or 0,
                    last_step=self.last_step,
                    device=self.device,
                )
                if self._continues_run:
                    self.distillation.load_state_dict((self._resumed or {}).get("distillation"))
                self.companions = self._companions()
            if self.companions is not None and self.companions.unlabelled is not None:
                more = {"task.distillation.unlabelled": self.companions.unlabelled.dataset}
                check_same_on_ranks(seen_by_rank(self.config, more))
            if not self._continues_run:
                self.distillation.fit_statistics(self.train_dataset, self.collater)

    def _companions(self) -> Companions | None:
        """What goes with the labelled structures of a step."""
        config, seed = self.distillation_config, self.config["cmd"]["seed"] or 0
        if config.rattle is None and config.unlabelled is None:
            return None
        if not getattr(backbone_of(self._unwrapped_model), "otf_graph", False):
            raise UserError(
                "task.distillation.rattle and unlabelled need model.otf_graph: true (of a hydra, "
                "model.backbone.otf_graph), since a graph read from the data set does not know "
                "the structures that they add."
            )
        rattler = unlabelled = None
        if config.rattle is not None and config.rattle.copies > 0:
            rattler = Rattler(config.rattle, seed)
        if config.unlabelled is not None:
            unlabelled = UnlabelledLoader(
                config.unlabelled,
                labelled=self.config["optim"].get("batch_size", 1),
                seed=seed,
                rank=distutils.get_rank(),
                ranks=distutils.get_world_size(),
                make_loader=self.get_dataloader,
            )
            assert self.distillation is not None
            unlabelled.check(self.distillation.teacher.check_elements)
        return Companions(rattler, unlabelled)

    def _check_ranks(self) -> None:
        """Make sure that all ranks go on from the same, with the same data, config and teacher."""
        if distutils.get_world_size() == 1:
            return
        loaders = {"train": self.train_loader, "val": self.val_loader, "test": self.test_loader}
        datasets = {f"dataset.{name}": it.dataset for name, it in loaders.items() if it is not None}
        seen = seen_by_rank(self.config, datasets)
        seen["the run's checkpoint"] = f"step {self.step}"
        if self.distillation_config.active_terms:
            path = self.distillation_config.teacher.checkpoint
            seen["task.distillation.teacher.checkpoint"] = file_seen(path or "")
        check_same_on_ranks(seen)

    # -- training ---------------------------------------------------------------------------------

    def train(self, disable_eval_tqdm: bool = False) -> None:
        if self.train_loader is None:
            raise UserError("dataset.train is missing: distillation needs structures to train on.")
        if self.scheduler.scheduler_type == "ReduceLROnPlateau" and self.val_loader is None:
            raise UserError(
                "optim.scheduler is ReduceLROnPlateau, which needs a dataset.val; give one, or "
                "choose another scheduler."
            )
        self._training = True
        with self.interruption:
            self._resume_own_run()
            if self._continues_run:
                check_same_steps(
                    self._resumed,
                    step=self.step,
                    epoch=self.epoch,
                    steps=len(self.train_loader),
                    run=self.timestamp_id,
                )
            self._check_ranks()
            self.check_labels()
            self._set_up_distillation()
            self._warn_of_no_evaluation()
            if distutils.is_master() and not self.is_debug:
                self.records = Records(self.config["cmd"]["checkpoint_dir"])
                self.records.write("config", step=self.step, config=self.config)
            if self._resumed is not None:
                self._finish_resumed_step(disable_eval_tqdm)
            super().train(disable_eval_tqdm=disable_eval_tqdm)
        self._training = False

    @property
    def last_step(self) -> int:
        """The optimiser steps of the whole training."""
        return self.config["optim"]["max_epochs"] * len(self.train_loader)

    def _warn_of_no_evaluation(self) -> None:
        """Stock saves and evaluates at multiples of a number of steps, and not at the end."""
        optim = self.config["optim"]
        steps = self.last_step
        eval_every = optim.get("eval_every", len(self.train_loader))
        if eval_every <= steps or self.is_debug or not distutils.is_master():
            return
        saved = 0 < optim.get("checkpoint_every", eval_every) <= steps
        left = "no best_checkpoint.pt" if saved else "no checkpoint"
        logging.warning(
            f"This training has {steps} steps, optim.eval_every is {eval_every}: it ends without "
            f"an evaluation and leaves {left}. Give a smaller optim.eval_every."
        )

    def _forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        check_finite(batch, tuple(self.output_targets))
        distillation = self.distillation
        if self._evaluating and self.interruption.asked() is Ask.LEAVE:
            self.interruption.leave()  # this step has been saved; its evaluation will be run again
        if self.model.training and self._random_state is not None:
            set_random_state(self._random_state)  # as it was at this step of the interrupted run
            self._random_state = None
        reported = self._validating and self.distillation_config.validate
        if distillation is None or not (self.model.training or reported):
            return super()._forward(batch)
        whole = batch
        if self.companions is not None and self.model.training:
            whole = self.companions.joined(batch, self.step)
            batch.to(self.device)  # in place, as stock's forward does with what it is given
        distillation.teacher.check_elements(whole.atomic_numbers)
        with distillation.tap_student() as features:
            out = super()._forward(whole)
        self._distilled = whole, out, features
        levels = {name: target["level"] for name, target in self.output_targets.items()}
        return out if whole is batch else labelled_part(out, batch, levels)

    def _compute_loss(self, out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        loss = super()._compute_loss(out, batch)
        taught, self._distilled = self._distilled, None
        if self.distillation is None or taught is None:
            return loss
        distilled = self.distillation.loss(*taught, self.step)
        return loss + distilled if self.model.training else loss

    def _compute_metrics(self, out: Any, batch: Batch, evaluator: Any, metrics: Any = None) -> Any:
        metrics = super()._compute_metrics(out, batch, evaluator, metrics)
        if self.distillation and self.model.training and self._is_printed:
            for name, value in self.distillation.read_values().items():
                metrics[name] = {"metric": value, "total": value, "numel": 1}
        return metrics

    @property
    def _is_printed(self) -> bool:
        return self.step % self.config["cmd"]["print_every"] == 0

    def _backward(self, loss: torch.Tensor) -> None:
        if self.distillation:
            self.distillation.zero_grad()
        super()._backward(loss)
        if self.records is not None and self._is_printed:
            metrics = {name: metric["metric"] for name, metric in self.metrics.items()}
            rate = self.scheduler.get_lr()
            self.records.write("train", step=self.step, epoch=self.epoch, lr=rate, metrics=metrics)
        asked = self.interruption.asked()
        if asked is not Ask.NOTHING:
            self.save()
        if asked is Ask.LEAVE:
            self.interruption.leave()

    def _step_projections(self, *_: Any) -> None:
        """Runs after every step of the student's optimiser, and so only where that took one."""
        if self.distillation:
            rate = self.optimizer.param_groups[0]["lr"] / self.config["optim"]["lr_initial"]
            self.distillation.step(rate, self.scaler)

    # -- evaluation -------------------------------------------------------------------------------

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> dict[str, Any]:
        distilled: dict[str, float] = {}
        with (
            self.distillation.values_apart() if self.distillation else nullcontext(),
            self._in_evaluation(),
        ):
            self._validating = True
            try:
                metrics = super().validate(split=split, disable_tqdm=disable_tqdm)
            finally:
                self._validating = False
            if self.distillation:
                distilled = self.distillation.read_values()
        if distilled and self.logger is not None:
            self.logger.log(distilled, step=self.step, split=split)
        values = {name: metric["metric"] for name, metric in metrics.items()} | distilled
        if self.records is not None:
            self.records.write(split, step=self.step, epoch=self.epoch, metrics=values)
        return metrics

    def update_best(
        self, primary_metric: str, val_metrics: dict[str, Any], disable_eval_tqdm: bool = True
    ) -> None:
        with self._in_evaluation():  # a new best one predicts the test set
            super().update_best(primary_metric, val_metrics, disable_eval_tqdm=disable_eval_tqdm)
        metric = float(val_metrics[primary_metric]["metric"])
        self._validated = {"step": self.step, "metric": metric}

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        """Within the block a training can leave at any batch, since its step has been saved."""
        if not self._training or not self.interruption.held:
            yield
            return
        if self._saved_step != self.step:
            self.save()
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

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
            self._saved_step = self.step
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "distillation": self.distillation.state_dict() if self.distillation else None,
            "random_states": random_states(gather=self._training),
            "scheduler_stepped": self._scheduled_step >= self.step,
            "validated": self._validated,
            "steps_per_epoch": len(self.train_loader) if self.train_loader is not None else None,
        }

    def load_checkpoint(
        self,
        checkpoint_path: str,
        checkpoint: dict[str, Any] | None = None,
        inference_only: bool = False,
    ) -> None:
        """Stock's, from a file read without executing code."""
        own = self._asked_to_resume and self._is_own(checkpoint_path)
        if checkpoint is None:
            logging.info(f"Loading checkpoint from: {checkpoint_path}")
            checkpoint = read_student(checkpoint_path, own=own)
        if own:
            check_same_run(checkpoint["config"], self.config, self.timestamp_id)
        super().load_checkpoint(checkpoint_path, checkpoint, inference_only)
        if inference_only:
            return
        if self.ema_decay and self.ema is None:
            # Stock drops EMA where the file has none, e.g. for an exported student.
            self.ema = ExponentialMovingAverage(self.model.parameters(), self.ema_decay)
        self._loaded_from = checkpoint_path
        self._resumed = checkpoint.get(STATE_KEY)
        self._saved_step = self.step if own else 0
        check_format(self._resumed, checkpoint_path)

    @property
    def _own_checkpoint(self) -> str:
        return os.path.join(self.config["cmd"]["checkpoint_dir"], "checkpoint.pt")

    @property
    def _continues_run(self) -> bool:
        """Whether what was loaded is this run's own, rather than a start for a new one."""
        return self._loaded_from != "" and self._is_own(self._loaded_from)

    def _is_own(self, path: str) -> bool:
        return os.path.abspath(path) == os.path.abspath(self._own_checkpoint)

    def _resume_own_run(self) -> None:
        """Go on from this run's own checkpoint, if it was asked for by name and there is one."""
        if not self._asked_to_resume:
            return
        if distutils.is_master():
            remove_leftovers(self._own_checkpoint)
        if self._continues_run:
            return
        if has_checkpoint(self._own_checkpoint):
            # It goes before the one that --checkpoint names: a requeued run goes on.
            self.load_checkpoint(self._own_checkpoint)
        else:
            logging.info(f"{self.timestamp_id} has no checkpoint: starting from the beginning")

    def _finish_resumed_step(self, disable_eval_tqdm: bool) -> None:
        """What the interrupted run had still to do after its save, in stock's order."""
        state, optim = self._resumed, self.config["optim"]
        assert state is not None
        set_random_state(random_state_for(state, distutils.get_rank()))
        eval_due = self.step % optim.get("eval_every", len(self.train_loader)) == 0
        self._validated = state["validated"]
        validated = self._validated is not None and self._validated["step"] == self.step
        if (
            eval_due
            and self.val_loader is not None
            and not (validated or state["scheduler_stepped"])
        ):
            metrics = self.validate(split="val", disable_tqdm=disable_eval_tqdm)
            self.update_best(self.primary_metric, metrics, disable_eval_tqdm=disable_eval_tqdm)
        if not state["scheduler_stepped"]:
            if self.scheduler.scheduler_type != "ReduceLROnPlateau":
                with warnings.catch_warnings():
                    # The optimiser has taken its step, but in the interrupted run.
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    self.scheduler.step()
            elif eval_due and self._validated is not None:
                self.scheduler.step(metrics=self._validated["metric"])
        self._scheduled_step = self.step
        self._resumed = None
        if self.step % len(self.train_loader) != 0:
            # In mid-epoch the loader is opened once more than in an uninterrupted run, which draws
            # a random number: the state goes back to this one when the first batch has come.
            self._random_state = random_state()


def _runs_on_cuda(stock: dict[str, Any]) -> bool:
    return torch.cuda.is_available() and not stock.get("cpu", False)
