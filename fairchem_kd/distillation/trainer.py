"""DistillationTrainer: all that distillation adds to a training.

The training loop, evaluation, normalisers, EMA, logging and checkpoints are fairchem's, and a run
goes on after a kill as every :class:`RestartableTrainer`'s does. A step goes

    batch -> student, its features tapped -> label loss (stock)
          -> teacher (frozen)             -> distillation losses -> total -> stock backward

where structures without labels and rattled copies join the batch before both models, and the
projections take their own optimiser step right after the student's.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fairchem_kd.data.build import ensure_built
from fairchem_kd.distillation.adversary import Adversary
from fairchem_kd.distillation.agreement import Agreement, tell_agreement
from fairchem_kd.distillation.companions import (
    ADVERSARIAL,
    Companions,
    RattleOptions,
    Rattler,
    UnlabelledLoader,
)
from fairchem_kd.distillation.companions.join import labelled_part
from fairchem_kd.distillation.config import parse_distillation, refuse_graph_parallel
from fairchem_kd.distillation.first_look import check_pair
from fairchem_kd.distillation.keeping import Wanted, keep, wanted_structures
from fairchem_kd.distillation.keeping_members import keep_members
from fairchem_kd.distillation.opening import open_teacher, teacher_seen
from fairchem_kd.distillation.prediction import prediction_of
from fairchem_kd.distillation.relying import refuse_new_copies, rely
from fairchem_kd.distillation.slopes import check_slopes
from fairchem_kd.distillation.terms import LABEL_LOSS, UNTRUSTED, Distillation
from fairchem_kd.distillation.watch import Watch
from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.features.wrappers import stock_model_config
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.teachers import EnsembleTeacher, LiveTeacher
from fairchem_kd.teachers.place import size_of
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.stored import StoredTeacher
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

    from fairchem_kd.features import Captured


MOST_UNTRUSTED = 0.5  # of the structures so far
SURE = 10  # steps before a share counts that is not all


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
        self.distillation: Distillation | None = None
        self.companions: Companions | None = None
        self._validating = False
        self._untrusted: list[float] = []  # shares, between two lines of the log
        self._distilled: tuple[Batch, dict[str, torch.Tensor], Captured] | None = None
        super().__init__(
            task=task,
            model=stock_model_config(model),
            flush_denormal=self.distillation_config.flush_denormal,
            **stock,
        )

    # -- before the first step --------------------------------------------------------------------

    def set_up(self) -> None:
        """Teacher, taps, terms and statistics; leaves the global random states as they were."""
        with isolated_random_state():
            teacher = self.make_distillation()
            if self.distillation is None or teacher is None:
                logging.info("No distillation losses: plain training")
                return
            if not (self.is_debug and teacher.is_here):  # debugging writes nothing
                self.keep_answers(teacher)
            self._say_what_is_not_taught()
            if not self.continues_run:
                self._fit_zero()
                self._check_agreement()
                self.distillation.fit_spreads(self.train_samples, self.collater)
                self.distillation.fit_statistics(self.train_samples, self.collater)
                self._check_pair()

    @property
    def train_samples(self) -> Any:
        """The training set, as the training itself reads it."""
        return self.kept(self.train_dataset)

    def _check_pair(self) -> None:
        """Refuse terms to which these two models give nothing; on the first rank, for all."""
        assert self.distillation is not None
        with refused_by_all():
            if rank() == 0:
                check_pair(self.distillation, self.train_samples, self.collater)
                check_slopes(self.distillation, self.train_samples, self.collater)

    def _check_agreement(self) -> None:
        """Say how the teacher does on the labels; on the first rank, for all."""
        distillation = self.distillation
        assert distillation is not None
        with refused_by_all():
            if rank() == 0 and not self.is_debug:
                found = distillation.agreement(self.train_samples, self.collater)
                tell_agreement(found, distillation.compares_energies)

    def look_at_labels(self) -> tuple[Agreement | None, bool]:
        """How the teacher does on the labels as they are, in a try of a training in one process.

        Where its energies are compared and only another zero keeps them from the labels, they are
        shifted from here on, and the second value is true.
        """
        distillation = self.distillation
        if distillation is None:
            return None, False
        found = distillation.agreement(self.train_samples, self.collater)
        shifted = found is not None and found.other_zero and distillation.compares_energies
        if shifted:
            distillation.fit_zero(self.train_samples, self.collater)
        return found, shifted

    def _fit_zero(self) -> None:
        distillation = self.distillation
        assert distillation is not None
        if distillation.zero_of != "labels":
            return
        if distillation.compares_energies:
            distillation.fit_zero(self.train_samples, self.collater)
            with refused_by_all():
                if self.companions is not None and self.companions.unlabelled is not None:
                    self.companions.unlabelled.check(distillation.check_elements)
        else:
            logging.info(
                "No loss compares energies, so task.distillation.teacher.energy_zero does nothing"
            )

    def _say_what_is_not_taught(self) -> None:
        assert self.distillation is not None
        left_out = self.distillation.not_taught
        if left_out:
            logging.info(
                f"The teacher does not predict {', '.join(left_out)}: the student learns it from "
                "its labels, and from the teacher's features where a loss compares them"
            )

    def make_distillation(self) -> LiveTeacher | EnsembleTeacher | RecordedTeacher | None:
        """Make `distillation` and `companions`; returns their teacher, None for plain training."""
        config = self.distillation_config
        if not config.active_terms:
            return None
        with refused_by_all():
            teacher = open_teacher(config.teacher, self.device)
            assert teacher is not None  # the config says so where there are terms
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
            if self.distillation.needs_slopes and self.scaler is not None:
                raise UserError(
                    "amp: true and a jacobian loss do not go together, since slopes of forces in "
                    "half precision are no slopes: set amp: false, or take jacobian_antithetic."
                )
            terms = self.distillation.terms.items()
            self._watch = Watch(
                [name for name, term in terms if term.needs_statistics],
                self.last_step,
                # a coefficient that is not the loss's own was chosen
                [n for n, t in terms if t.coefficient != t.default_coefficient],
            )
            if self.companions is None:
                self.companions = self.make_companions(teacher.check_elements)
        rattler = None if self.companions is None else self.companions.rattler
        if self.companions and rattler and rattler.options.mode == ADVERSARIAL:
            self.companions.adversary = Adversary(self.distillation, rattler)
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

    def keep_answers(
        self,
        teacher: LiveTeacher | EnsembleTeacher | RecordedTeacher,
        part: tuple[int, int] | None = None,
    ) -> None:
        """From here on the teacher's answers come out of a store, where there is to be one.

        Args:
            teacher: the teacher.
            part: which of how many parts of the store is filled; by default this rank's.
        """
        assert self.distillation is not None
        requests = self.distillation.teacher_requests
        stored: StoredTeacher | EnsembleTeacher | None
        if isinstance(teacher, RecordedTeacher):
            refuse_new_copies(self.companions)
            stored = rely(teacher, requests, self.wanted())
        else:
            kept = partial(
                keep,
                wanted=self.wanted(),
                run_dir=self._run_dir,
                device=self.device,
                part=part,
                stop=lambda: self.interruption.noted,
            )
            config = self.distillation_config.teacher
            if isinstance(teacher, EnsembleTeacher):
                stored = keep_members(teacher, requests, config, kept)
            else:
                stored = kept(teacher, requests, config)
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
        config, seed = self.distillation_config, self.config["cmd"]["seed"] or 0
        if config.rattle is None and config.unlabelled is None:
            return None
        if not getattr(backbone_of(self._unwrapped_model), "otf_graph", False):
            raise UserError(
                "task.distillation.rattle and unlabelled need model.otf_graph: true (of a hydra, "
                "model.backbone.otf_graph), since a graph read from the data set does not know "
                "the structures that they add."
            )
        unlabelled = None
        if config.unlabelled is not None:
            unlabelled = UnlabelledLoader(
                config.unlabelled,
                labelled=self.config["optim"].get("batch_size", 1),
                seed=seed,
                rank=rank(),
                ranks=world_size(),
                make_loader=self.get_dataloader,
                keep=self.kept,
            )
            unlabelled.check(check_elements)
        rattler = None
        if config.rattle is not None and config.rattle.copies > 0:
            taken = self.config["optim"].get("batch_size", 1)
            more = 0 if unlabelled is None else unlabelled.options.per_step(taken)
            config.rattle.check_pairs(taken + more)
            rattler = Rattler(config.rattle, seed, self._copies_of_each(config.rattle, unlabelled))
        return Companions(rattler, unlabelled)

    def _copies_of_each(self, rattle: RattleOptions, unlabelled: UnlabelledLoader | None) -> float:
        """Rattled copies of each structure that the training takes, whatever its ranks."""
        labelled = len(self.train_dataset)
        taken, structures = float(labelled), labelled
        if unlabelled is not None:
            share = unlabelled.options.share
            taken += labelled * share / (1 - share)
            structures += len(unlabelled.dataset)
        return self.config["optim"]["max_epochs"] * rattle.copies * taken / max(structures, 1)

    def seen(self) -> dict[str, Any]:
        if not self.distillation_config.active_terms:
            return {}
        return teacher_seen(self.distillation_config.teacher)

    # -- a step -----------------------------------------------------------------------------------

    def run_model(self, batch: Batch) -> dict[str, torch.Tensor]:
        distillation = self.distillation
        reported = self._validating and self.distillation_config.validate
        if distillation is None or not (self.model.training or reported):
            return super().run_model(batch)
        if not distillation.running(self.step):
            return super().run_model(batch)  # schedules: none has begun, or all have ended
        whole = batch
        if self.companions is not None and self.model.training:
            whole = self.companions.joined(batch, self.step)
            batch.to(self.device)  # in place, as stock's forward does with what it is given
        distillation.check_elements(whole.atomic_numbers)
        with distillation.tap_student(whole) as features:
            out = super().run_model(whole)
        self._distilled = whole, out, features
        levels = {name: target["level"] for name, target in self.output_targets.items()}
        return out if whole is batch else labelled_part(out, batch, levels)

    def _compute_loss(self, out: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        loss = super()._compute_loss(out, batch)
        taught, self._distilled = self._distilled, None
        if self.distillation is None:
            return loss
        factor = self.distillation.label_factor(self.step) if self.model.training else 1.0
        if self.companions is not None and self.model.training and taught is not None:
            factor *= self.companions.label_factor
        if factor != 1.0:
            loss = factor * loss
        if taught is None:
            return loss
        distilled = self.distillation.loss(*taught, self.step, loss)
        return loss + distilled if self.model.training else loss

    def _backward(self, loss: torch.Tensor) -> None:
        if self.distillation:
            self.distillation.projections.zero_grad()
        super()._backward(loss)

    def load_extras(self) -> None:
        super().load_extras()
        self.optimizer.register_step_post_hook(self._step_projections)

    def _step_projections(self, *_: Any) -> None:
        """Runs after every step of the student's optimiser, and so only where that took one."""
        if self.distillation and self.distillation.trains_projections(self.step):
            rate = self.optimizer.param_groups[0]["lr"] / self.config["optim"]["lr_initial"]
            self.distillation.projections.step(rate, self.scaler)

    # -- records, evaluation, checkpoints ---------------------------------------------------------

    @property
    def teacher_prediction(self) -> Predict | None:
        if self.distillation is None:
            return None
        return prediction_of(self.distillation, self.output_targets)

    def cost_in_words(self) -> str:
        if self.distillation is None:
            return ""
        teacher = self.distillation.teacher
        stores = teacher.stores if isinstance(teacher, EnsembleTeacher) else [teacher]
        folders = [one.folder for one in stores if isinstance(one, StoredTeacher)]
        if not folders:
            return "; the teacher was asked at every step"
        return (
            f"; what the teacher said is kept in {', '.join(map(str, folders))} "
            f"({sum(map(size_of, folders)) / 1e6:.0f} MB)"
        )

    def values(self) -> dict[str, float]:
        if self.distillation is None:
            return {}
        values = self.distillation.values.read()
        if self.model.training:
            if rank() == 0:
                self._watch.look(self.step, values, values.get(LABEL_LOSS, 0.0))
            self._untrusted.append(values.get(UNTRUSTED, 0.0))
        share = sum(self._untrusted) / max(len(self._untrusted), 1)
        if share == 1.0 or (share > MOST_UNTRUSTED and self.step >= SURE):
            raise UserError(
                f"Step {self.step}: of {share:.0%} of the structures the teacher says "
                "NaN or infinity, so that it teaches little: take structures like those that it "
                "was trained on, or another teacher."
            )
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
        return self.distillation.state_dict() if self.distillation else None

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        if self.distillation is not None:
            self.distillation.load_state_dict(state)
        elif state is not None:
            raise UserError(
                "task.distillation.losses is empty, but this run was started with losses: give "
                "the same as then, or start a new run."
            )
