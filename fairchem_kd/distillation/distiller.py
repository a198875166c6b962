"""Distillation in a training loop of one's own: the losses of a config, without trainer or YAML.

    batch -> student inside `watch`, its features tapped -> `loss` asks the teacher and compares

`DistillationTrainer` is one such loop: its steps are those of a Distiller, which it makes of its
config (`Distiller.of`) in place of Python objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.distillation.given import (
    OUTPUTS,
    check_batch,
    check_steps,
    first_batches,
    teacher_of,
    terms_of,
)
from fairchem_kd.distillation.slopes import check_slopes_on
from fairchem_kd.distillation.statistics import Collate, fit_on_batches
from fairchem_kd.distillation.terms import Distillation
from fairchem_kd.errors import UserError
from fairchem_kd.features import Captured
from fairchem_kd.features.architecture import unwrap
from fairchem_kd.machine import FP32
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.models.frozen import shaped_outputs
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.label_losses import DEFAULT, label_losses
from fairchem_kd.teachers import Teacher
from fairchem_kd.training.ranks import average_gradients

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch


@dataclass
class Watching:
    """What is seen of the student's one forward inside `Distiller.watch`."""

    #: the student's outputs by name, ``(B, C)`` of structures and ``(N, C)`` of atoms, normalised;
    #: where nobody sets them inside the block, what its forward gave
    outputs: Mapping[str, Tensor] | None = None


class Watched(NamedTuple):
    """A batch, and what the student gave and computed inside."""

    batch: Batch
    outputs: Mapping[str, Tensor]
    features: Captured


class Distiller:
    """Teacher and loss terms for a student in a loop of one's own.

    ::

        distiller = Distiller(student, "teacher.pt", {"n2n": {}, "vanilla": {}}, units=units)
        distiller.fit(batches)
        optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-3)
        for batch in loader:
            with distiller.watch(batch):
                out = student(batch)
            loss = my_loss(out, batch) + distiller.loss()

    Nothing of it belongs to the student, whose ``state_dict`` stays that of the stock model.

    Args:
        student: a fairchem model, bare or in DistributedDataParallel, on its device.
        teacher: the path of a checkpoint; a `fairchem_kd.Teacher`; a fairchem model, which is
            frozen and taken to give physical units; or whatever has the methods of
            `fairchem_kd.teachers.Teacher`. A list of the first three is an ensemble, whose mean
            teaches, with the features of its first member.
        losses: by name the options of each term, as under ``task.distillation.losses``, or the
            names of those that are taken with their defaults.
        units: the student's normalisers and element references; without them its outputs are
            physical (eV, eV/Å).
        outputs: what the student gives, as the ``outputs`` of a config.
        loss_functions: how labels are learned, as in a config: vanilla goes by them.
        steps: of the whole training, which schedules need that end with it.
        precision: of a teacher that is given as a file or a model.
        seed: of the projections' own random generator.

    Raises:
        UserError: a pairing that cannot work, or options that do not fit; it names the term.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: str | Path | nn.Module | FrozenModel | Teacher | list[Any],
        losses: Mapping[str, Any] | Iterable[str],
        *,
        units: Units | None = None,
        outputs: Mapping[str, Mapping[str, Any]] | None = None,
        loss_functions: Iterable[Mapping[str, Any]] = DEFAULT,
        steps: int | None = None,
        precision: str = FP32,
        seed: int = 0,
    ) -> None:
        if not isinstance(student, nn.Module):
            raise UserError(f"The student is a {type(student).__name__}, and not a model.")
        self._student = unwrap(student)
        device = next((p.device for p in self._student.parameters()), torch.device("cpu"))
        config = DistillationConfig()
        config.terms = terms_of(losses)
        if not config.active_terms:
            raise UserError("losses: there is no term with a coefficient above 0, so take one.")
        check_steps(steps, config)
        wanted = {k: dict(v) for k, v in (OUTPUTS if outputs is None else outputs).items()}
        if outputs is None and not getattr(self._student, "regress_forces", True):
            del wanted["forces"]
        self._outputs: Mapping[str, Mapping[str, Any]] = wanted
        learned = [
            (target, one) for target, one in label_losses(loss_functions) if target in wanted
        ]
        with isolated_random_state():
            distillation = Distillation(
                config,
                self._student,
                teacher_of(teacher, self._student, device, precision),
                Units({}, {}) if units is None else units,
                label_losses=learned,
                outputs=wanted,
                seed=seed,
                last_step=steps or 1,
                device=device,
            )
        self._start(distillation)
        self._unchecked = distillation.follows_positions  # by `check_slopes_on`, on the first batch

    @classmethod
    def of(cls, distillation: Distillation) -> Distiller:
        """The one of teacher, taps and terms that are there, as a trainer makes them."""
        made = cls.__new__(cls)
        made._student = distillation.student
        made._outputs = distillation.targets
        made._start(distillation)
        made._unchecked = False  # a trainer looks at its data set
        return made

    def _start(self, distillation: Distillation) -> None:
        #: teacher, taps and terms
        self.distillation = distillation
        self._unfitted = [t.where for t in distillation.terms.values() if t.needs_statistics]
        #: what was watched and is not yet compared
        self.watched: Watched | None = None
        #: optimiser steps so far, which schedules go by: one for each call of `loss` in training
        self.step = 0

    # -- a step -----------------------------------------------------------------------------------

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[Watching]:
        """Tap the student during its one forward of ``batch`` inside the block.

        Raises:
            UserError: no batch, elements of which the teacher says nothing, or not exactly one
                forward.
        """
        check_batch(batch, "watch")
        self.watched = None
        distillation = self.distillation
        distillation.check_elements(batch.atomic_numbers)
        pairing = [t.where for t in distillation.terms.values() if t.needs_pairs]
        if pairing and self._student.training and "pairs" not in batch:
            raise UserError(
                f"{pairing[0]} compares structures in pairs, and the batch does not say which: set "
                "batch.pairs = fairchem_kd.losses.pair_atoms(batch.natoms, pairs)."
            )
        if self._unchecked:
            check_slopes_on(batch.clone().to(distillation.device), distillation)
            self._unchecked = False
        given: list[Any] = []
        hook = self._student.register_forward_hook(lambda *args: given.append(args[-1]))
        watching = Watching()
        try:
            with distillation.tap_student(batch) as features:
                yield watching
                if len(given) != 1:
                    raise UserError(
                        f"The student ran {len(given)} times inside one `watch`, and has to run "
                        "once: put its forward, and no other, into the block."
                    )
        finally:
            hook.remove()
        outputs = watching.outputs
        if outputs is None:
            outputs = shaped_outputs(given[0], self._outputs, batch, "the student")
        self.watched = Watched(batch, outputs, features)

    def loss(self, labels: Tensor | None = None, *, step: int | None = None) -> Tensor:
        """The weighted sum of the terms on the batch that was watched last, ``()``.

        The mean is over the elements of all ranks, times their number, since
        DistributedDataParallel averages gradients over them. Of a student in training this counts
        as a step, where ``step`` does not say which step it is.

        Args:
            labels: your own loss on the labels, ``()``, as it counts: it is noted as
                ``label_loss`` in `values` and added to nothing.
            step: the number of the optimiser step, from 1 on, by which schedules go; where one
                takes several batches, give each of them the same.

        Raises:
            UserError: nothing was watched since the last call, or statistics are not fitted.
        """
        if self.watched is None:
            raise UserError(
                "There is nothing to compare: run the student inside `with distiller.watch(batch):`"
                " before each `distiller.loss()`."
            )
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise UserError(f"step is {step!r:.40}, and has to be a number of 0 or more.")
        if self._unfitted:
            raise UserError(
                f"{self._unfitted[0]} compares standardised features, whose statistics are not "
                "there yet: call `distiller.fit(batches)` first, or give it standardize=False."
            )
        watched, self.watched = self.watched, None
        if step is None:
            self.step += self._student.training
            step = max(self.step, 1)
        else:
            self.step = step
        return self.distillation.loss(*watched, step, labels)

    # -- statistics and projections ---------------------------------------------------------------

    def fit(self, batches: Iterable[Batch], samples: int = 256) -> None:
        """Fix the standardisation of the teacher's features.

        Args:
            batches: of training structures; labels are not read. In several processes give each
                the same.
            samples: after that many structures no further batch is taken.

        Raises:
            UserError: there is none, one that the teacher cannot take, or a feature that does not
                vary.
        """
        distillation = self.distillation
        terms = [term for term in distillation.terms.values() if term.needs_statistics]
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise UserError(f"samples is {samples!r:.40}, and has to be a number of 1 or more.")
        if terms:
            fit_on_batches(
                terms,
                distillation.teacher,
                distillation.teacher_requests,
                first_batches(batches, samples),
                distillation.device,
            )
        self._unfitted = []

    def fit_on(self, dataset: Dataset, collate: Collate) -> None:
        """`fit` on evenly spread samples of a data set, on the first rank for all; a collective.

        Args:
            dataset: of training structures.
            collate: makes a batch of samples.

        Raises:
            UserError: on every rank, what `fit` refuses.
        """
        self.distillation.fit_statistics(dataset, collate)
        self._unfitted = []

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained with the student: the projections. Give them to the optimiser."""
        return self.distillation.modules.parameters()

    def average_gradients(self) -> None:
        """After backward in several processes: these are not in DistributedDataParallel."""
        average_gradients(self.distillation.trained_at(max(self.step, 1)))

    def values(self) -> dict[str, float]:
        """Raw and weighted value of each term, the mean over the steps since the last reading."""
        return self.distillation.values.read()

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Projections, statistics and the step, and what they belong to."""
        return {"step": self.step, **self.distillation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it is none, or one of another teacher or of other terms.
        """
        if not isinstance(state, Mapping) or not {"step", "identity", "terms"} <= set(state):
            raise UserError("This is no state of a Distiller: give what its `state_dict` gave.")
        self.distillation.load_state_dict(state)
        self.step = int(state["step"])
        self._unfitted = []
