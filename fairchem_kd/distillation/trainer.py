"""DistillationTrainer: all that distillation adds to a training.

The training loop, evaluation, normalisers, EMA, logging and checkpoints are fairchem's, and a run
goes on after a kill as every :class:`RestartableTrainer`'s does. A step goes

    batch -> student, its features tapped -> label loss (stock)
          -> teacher (frozen)             -> distillation losses -> total -> stock backward

where structures without labels and rattled copies join the batch before both models, and the
projections take their own optimiser step right after the student's. The teacher's part of it is
that of :class:`~fairchem_kd.distillation.distiller.Distiller`, as in a loop of one's own.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fairchem_kd.data.build import ensure_built
from fairchem_kd.distillation.adversary import Adversary
from fairchem_kd.distillation.answering import Answering, folders_of, kept_answers
from fairchem_kd.distillation.companions import ADVERSARIAL, Companions, make_companions
from fairchem_kd.distillation.companions.join import labelled_part
from fairchem_kd.distillation.config import parse_distillation, refuse_graph_parallel
from fairchem_kd.distillation.distiller import Distiller
from fairchem_kd.distillation.fitting import fit_to, tell_untaught
from fairchem_kd.distillation.keeping import Wanted, wanted_structures
from fairchem_kd.distillation.opening import open_teacher, teacher_seen
from fairchem_kd.distillation.prediction import prediction_of
from fairchem_kd.distillation.projections import Projections
from fairchem_kd.distillation.summing import LABEL_LOSS
from fairchem_kd.distillation.terms import UNTRUSTED, Distillation
from fairchem_kd.distillation.watch import Watch
from fairchem_kd.errors import UserError
from fairchem_kd.features.wrappers import stock_model_config
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.teachers.place import size_of
from fairchem_kd.training.interruption import Ask
from fairchem_kd.training.ranks import (
    check_same_on_ranks,
    rank,
    refused_by_all,
    seen_by_rank,
    world_size,
)
from fairchem_kd.training.restartable import Predict, RestartableTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_geometric.data import Batch

    from fairchem_kd.distillation.opening import OpenTeacher


class DistillationTrainer(RestartableTrainer):
    """Trains a stock student on its labels and on the hidden features of a teacher.

    Configured by ``task.distillation``
    (:class:`fairchem_kd.distillation.config.DistillationConfig`); every other argument is
    OCPTrainer's. Its checkpoints are stock checkpoints of the student, with one more key for what
    only distillation needs. Validation and prediction run the student alone.

    Raises:
        UserError: a wrong config, dataset, teacher or pairing, before training starts.
    """

    collater: Callable[[list[Any]], Batch]

    def __init__(self, task: dict[str, Any], model: dict[str, Any], **stock: Any) -> None:
        self.distillation_config = parse_distillation(task)
        refuse_graph_parallel(stock.get("gp_gpus"))
        ensure_built({"dataset": stock.get("dataset") or {}, "task": task})
        #: teacher and losses; None: plain training
        self.distiller: Distiller | None = None
        self.companions: Companions | None = None
        self._validating = False
        super().__init__(
            task=task,
            model=stock_model_config(model),
            flush_denormal=self.distillation_config.flush_denormal,
            **stock,
        )

    @property
    def distillation(self) -> Distillation | None:
        """The distiller's teacher, taps and terms."""
        return None if self.distiller is None else self.distiller.distillation

    # -- before the first step --------------------------------------------------------------------

    def set_up(self) -> None:
        """Teacher, taps, terms and statistics; leaves the global random states as they were."""
        with isolated_random_state():
            teacher = self.make_distillation()
            if self.distiller is None or teacher is None:
                logging.info("No distillation losses: plain training")
                return
            if not (self.is_debug and teacher.is_here):  # debugging writes nothing
                self.keep_answers(teacher)
            tell_untaught(self.distiller.distillation)
            if not self.continues_run:
                samples, agreement = self.train_samples, not self.is_debug
                fit_to(self.distiller, self.companions, samples, self.collater, agreement=agreement)

    @property
    def train_samples(self) -> Any:
        """The training set, as the training itself reads it."""
        return self.kept(self.train_dataset)

    def make_distillation(self) -> OpenTeacher | None:
        """Make `distiller` and `companions`; returns their teacher, None for plain training."""
        config = self.distillation_config
        if not config.active_terms:
            return None
        with refused_by_all():
            teacher = open_teacher(config.teacher, self.device)
            assert teacher is not None  # the config says so where there are terms
            distillation = Distillation(
                config,
                self._unwrapped_model,
                teacher,
                Units(self.normalizers, self.elementrefs),
                label_losses=self.loss_functions,
                outputs=self.output_targets,
                seed=self.config["cmd"]["seed"] or 0,
                last_step=self.last_step,
                device=self.device,
            )
            if distillation.follows_positions and self.scaler is not None:
                raise UserError(
                    "amp: true and a loss on slopes of forces (jacobian, antisymmetric) do not go "
                    "together, since slopes in half precision are none: set amp: false, or take "
                    "jacobian_antithetic."
                )
            self.distiller = Distiller.of(distillation)
            self.projections = Projections(
                self.distiller.parameters(),
                config.projections,
                learning_rate=self.config["optim"]["lr_initial"],
                clip_grad_norm=self.clip_grad_norm,
            )
            terms = distillation.terms.items()
            self._watch = Watch(
                [name for name, term in terms if term.needs_statistics],
                self.last_step,
                # a coefficient that is not the loss's own was chosen, and so is one that follows
                [n for n, t in terms if config.balancing or t.coefficient != t.default_coefficient],
            )
            if self.companions is None:
                self.companions = self.make_companions(teacher.check_elements)
        rattler = None if self.companions is None else self.companions.rattler
        if self.companions and rattler and rattler.options.mode == ADVERSARIAL:
            self.companions.adversary = Adversary(distillation, rattler)
        if self.companions is not None and self.companions.unlabelled is not None:
            more = {"task.distillation.unlabelled": self.companions.unlabelled.dataset}
            check_same_on_ranks(seen_by_rank(self.config, more))
        return teacher

    def wanted(self) -> list[Wanted]:
        """What this training will ask its teacher about."""
        config = self.config
        return wanted_structures(
            (self.train_samples, config["dataset"]),
            self.collater,
            self.companions,
            (self.kept(self.val_dataset), config["val_dataset"])
            if self._reports_validation
            else None,
            steps=self.last_step,
            per_step=config["optim"].get("batch_size", 1) * world_size(),
        )

    def keep_answers(self, teacher: OpenTeacher, part: tuple[int, int] | None = None) -> None:
        """From here on the teacher's answers come out of a store, where there is to be one.

        Args:
            teacher: the teacher.
            part: which of how many parts of the store is filled; by default this rank's.
        """
        assert self.distillation is not None
        stored = kept_answers(
            teacher,
            self.distillation_config.teacher,
            Answering(
                requests=self.distillation.teacher_requests,
                wanted=self.wanted(),
                companions=self.companions,
                run_dir=self._run_dir,
                device=self.device,
                part=part,
                stop=lambda: self.interruption.noted,
            ),
        )
        if self.interruption.asked() is Ask.LEAVE:
            self.interruption.leave()  # nothing is lost: the store goes on where it was
        if stored is None:
            return
        self.distillation.teacher = stored
        if self.companions is not None:
            self.companions.said = stored.said
        self.collater = stored.reading(self.collater)  # of loaders to come
        self.train_loader.collate_fn = self.collater
        if self._reports_validation:
            self.val_loader.collate_fn = self.collater

    @property
    def _reports_validation(self) -> bool:
        return self.distillation_config.validate and self.val_loader is not None

    def make_companions(self, check_elements: Callable[[torch.Tensor], None]) -> Companions | None:
        """What goes with the labelled structures of a step.

        Args:
            check_elements: refuses atoms that the teacher knows nothing about.
        """
        return make_companions(
            self.distillation_config.rattle,
            self.distillation_config.unlabelled,
            self._unwrapped_model,
            labelled=len(self.train_dataset),
            batch_size=self.config["optim"].get("batch_size", 1),
            max_epochs=self.config["optim"]["max_epochs"],
            seed=self.config["cmd"]["seed"] or 0,
            make_loader=self.get_dataloader,
            keep=self.kept,
            check_elements=check_elements,
        )

    def seen(self) -> dict[str, Any]:
        if not self.distillation_config.active_terms:
            return {}
        return teacher_seen(self.distillation_config.teacher)

    # -- a step -----------------------------------------------------------------------------------

    def run_model(self, batch: Batch) -> dict[str, torch.Tensor]:
        distiller = self.distiller
        reported = self._validating and self.distillation_config.validate
        if distiller is None or not (self.model.training or reported):
            return super().run_model(batch)
        if not distiller.distillation.running(self.step):
            return super().run_model(batch)  # schedules: none has begun, or all have ended
        whole = batch
        if self.companions is not None and self.model.training:
            whole = self.companions.joined(batch, self.step)
            batch.to(self.device)  # in place, as stock's forward does with what it is given
        with distiller.watch(whole) as seen:
            out = seen.outputs = super().run_model(whole)
        levels = {name: target["level"] for name, target in self.output_targets.items()}
        return out if whole is batch else labelled_part(out, batch, levels)

    def _compute_loss(self, out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        loss = super()._compute_loss(out, batch)
        distiller = self.distiller
        if distiller is None:
            return loss
        watched, training = distiller.watched is not None, self.model.training
        factor = distiller.distillation.label_factor(self.step) if training else 1.0
        if self.companions is not None and training and watched:
            factor *= self.companions.label_factor
        if factor != 1.0:
            loss = factor * loss
        if not watched:
            return loss
        distilled = distiller.loss(loss, step=self.step)
        return loss + distilled if training else loss

    def _backward(self, loss: torch.Tensor) -> None:
        if self.distiller:
            self.projections.zero_grad()
        super()._backward(loss)

    def load_extras(self) -> None:
        super().load_extras()
        self.optimizer.register_step_post_hook(self._step_projections)

    def _step_projections(self, *_: Any) -> None:
        """Runs after every step of the student's optimiser, and so only where that took one."""
        trained = self.distillation.trained_at(self.step) if self.distillation else []
        if trained:
            rate = self.optimizer.param_groups[0]["lr"] / self.config["optim"]["lr_initial"]
            self.projections.step(rate, self.scaler, trained)

    # -- records, evaluation, checkpoints ---------------------------------------------------------

    @property
    def teacher_prediction(self) -> Predict | None:
        if self.distillation is None:
            return None
        return prediction_of(self.distillation, self.output_targets)

    def cost_in_words(self) -> str:
        if self.distillation is None:
            return ""
        folders = folders_of(self.distillation.teacher)
        if not folders:
            return "; the teacher was asked at every step"
        return (
            f"; what the teacher said is kept in {', '.join(map(str, folders))} "
            f"({sum(map(size_of, folders)) / 1e6:.0f} MB)"
        )

    def values(self) -> dict[str, float]:
        if self.distiller is None:
            return {}
        values = self.distiller.values()
        if self.model.training:
            if rank() == 0:
                self._watch.look(self.step, values, values.get(LABEL_LOSS, 0.0))
            self._watch.untrusted(self.step, values.get(UNTRUSTED, 0.0))
        return values

    def validate(self, split: str = "val", disable_tqdm: bool = False) -> dict[str, Any]:
        self._validating = True
        try:
            with self.distillation.values.apart() if self.distillation else nullcontext():
                metrics = super().validate(split=split, disable_tqdm=disable_tqdm)
        finally:
            self._validating = False
        if split == "val" and self.distillation is not None:  # and with it what watches it
            self._watch.validated(
                self.step,
                {name: metric["metric"] for name, metric in metrics.items()},
                distilling=bool(self.distillation.running(self.step)),
                names=[f"{target}_mae" for target in self.output_targets],
            )
        return metrics

    def own_state(self) -> dict[str, Any] | None:
        if self.distiller is None:
            return None
        return {**self.distiller.state_dict(), "optimizer": self.projections.state_dict()}

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        if self.distiller is not None:
            state = state or {"identity": {}, "terms": {}}  # of a run without distillation
            self.distiller.load_state_dict({"step": self.step, **state})
            self.projections.load_state_dict(state["optimizer"])
        elif state is not None:
            raise UserError(
                "task.distillation.losses is empty, but this run was started with losses: give "
                "the same as then, or start a new run."
            )
