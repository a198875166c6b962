"""Distillation in a training loop of one's own: the losses of a config, without trainer or YAML.

    batch -> student inside `watch`, its features tapped -> `loss` asks the teacher and compares

It is what `DistillationTrainer` stands on too, `fairchem_kd.distillation.terms.Distillation`, made
of Python objects in place of a config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fairchem_kd.distillation.config import DistillationConfig, loss_term
from fairchem_kd.distillation.slopes import check_slopes_on
from fairchem_kd.distillation.statistics import fit_on_batches
from fairchem_kd.distillation.terms import Distillation
from fairchem_kd.errors import UserError
from fairchem_kd.features import Captured
from fairchem_kd.features.architecture import unwrap
from fairchem_kd.losses.schedule import Schedule
from fairchem_kd.machine import FP32
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.models.frozen import shaped_outputs
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.label_losses import DEFAULT, label_losses
from fairchem_kd.teachers import EnsembleTeacher, LiveTeacher, Teacher
from fairchem_kd.training.ranks import average_gradients

if TYPE_CHECKING:
    from torch_geometric.data import Batch

#: What fairchem's models of energies and forces give.
OUTPUTS: dict[str, dict[str, Any]] = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True},
}


class _Watched(NamedTuple):
    batch: Batch
    outputs: dict[str, Tensor]
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
        config.terms = _terms(losses)
        if not config.active_terms:
            raise UserError("losses: there is no term with a coefficient above 0, so take one.")
        _check_steps(steps, config)
        wanted = {k: dict(v) for k, v in (OUTPUTS if outputs is None else outputs).items()}
        if outputs is None and not getattr(self._student, "regress_forces", True):
            del wanted["forces"]
        self._outputs = wanted
        learned = [
            (target, one) for target, one in label_losses(loss_functions) if target in wanted
        ]
        with isolated_random_state():
            self._distillation = Distillation(
                config,
                self._student,
                _teacher(teacher, self._student, device, precision),
                Units({}, {}) if units is None else units,
                label_losses=learned,
                outputs=wanted,
                learning_rate=1e-3,  # its own optimiser is not used: see `parameters`
                clip_grad_norm=None,
                seed=seed,
                last_step=steps or 1,
                device=device,
            )
        terms = self._distillation.terms.values()
        self._unfitted = [term.where for term in terms if term.needs_statistics]
        self._unchecked = self._distillation.needs_slopes
        self._watched: _Watched | None = None
        #: optimiser steps so far, which schedules go by: one for each call of `loss` in training
        self.step = 0

    # -- a step -----------------------------------------------------------------------------------

    @contextmanager
    def watch(self, batch: Batch) -> Iterator[None]:
        """Tap the student during its one forward of ``batch`` inside the block.

        Raises:
            UserError: elements of which the teacher says nothing, or not exactly one forward.
        """
        self._watched = None
        self._distillation.check_elements(batch.atomic_numbers)
        pairing = [t.where for t in self._distillation.terms.values() if t.needs_pairs]
        if pairing and self._student.training and "pairs" not in batch:
            raise UserError(
                f"{pairing[0]} compares structures in pairs, and the batch does not say which: set "
                "batch.pairs = fairchem_kd.losses.pair_atoms(batch.natoms, pairs)."
            )
        if self._unchecked:
            check_slopes_on(batch.clone().to(self._distillation.device), self._distillation)
            self._unchecked = False
        given: list[Any] = []
        hook = self._student.register_forward_hook(lambda *args: given.append(args[-1]))
        try:
            with self._distillation.tap_student(batch) as features:
                yield
                if len(given) != 1:
                    raise UserError(
                        f"The student ran {len(given)} times inside one `watch`, and has to run "
                        "once: put its forward, and no other, into the block."
                    )
        finally:
            hook.remove()
        outputs = shaped_outputs(given[0], self._outputs, batch, "the student")
        self._watched = _Watched(batch, outputs, features)

    def loss(self) -> Tensor:
        """The weighted sum of the terms on the batch that was watched last, ``()``.

        The mean is over the elements of all ranks, times their number, since
        DistributedDataParallel averages gradients over them. Of a student in training this counts
        as a step.

        Raises:
            UserError: nothing was watched since the last call, or statistics are not fitted.
        """
        if self._watched is None:
            raise UserError(
                "There is nothing to compare: run the student inside `with distiller.watch(batch):`"
                " before each `distiller.loss()`."
            )
        if self._unfitted:
            raise UserError(
                f"{self._unfitted[0]} compares standardised features, whose statistics are not "
                "there yet: call `distiller.fit(batches)` first, or give it standardize=False."
            )
        watched, self._watched = self._watched, None
        if not self._student.training:
            return self._distillation.loss(*watched, max(self.step, 1))
        self.step += 1
        return self._distillation.loss(*watched, self.step)

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
        distillation = self._distillation
        terms = [term for term in distillation.terms.values() if term.needs_statistics]
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise UserError(f"samples is {samples!r:.40}, and has to be a number of 1 or more.")
        if terms:
            fit_on_batches(
                terms,
                distillation.teacher,
                distillation.teacher_requests,
                _first(batches, samples),
                distillation.device,
            )
        self._unfitted = []

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained with the student: the projections. Give them to the optimiser."""
        return self._distillation.modules.parameters()

    def average_gradients(self) -> None:
        """After backward in several processes: these are not in DistributedDataParallel."""
        average_gradients(self.parameters())

    def values(self) -> dict[str, float]:
        """Raw and weighted value of each term, the mean over the steps since the last reading."""
        return self._distillation.values.read()

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Projections, statistics and the step, and what they belong to."""
        state = self._distillation.state_dict()
        return {"step": self.step, **{key: state[key] for key in ("identity", "terms")}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it is none, or one of another teacher or of other terms.
        """
        if not isinstance(state, Mapping) or not {"step", "identity", "terms"} <= set(state):
            raise UserError("This is no state of a Distiller: give what its `state_dict` gave.")
        self._distillation.load_state_dict({**state, "optimizer": None})
        self.step = int(state["step"])
        self._unfitted = []


def _terms(losses: Any) -> dict[str, Any]:
    if isinstance(losses, str):
        losses = [losses]
    if not isinstance(losses, Mapping):
        try:
            losses = {str(name): {} for name in losses}
        except TypeError:
            raise UserError(
                f"losses is a {type(losses).__name__}, and not terms by name with their options."
            ) from None
    return {
        str(name): loss_term(str(name), given, "losses")
        for name, given in losses.items()
        if given is not None
    }


def _check_steps(steps: Any, config: DistillationConfig) -> None:
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps is {steps!r:.40}, and has to be a number of 1 or more.")
    for term in config.active_terms.values():
        if steps is None and term.schedule != Schedule():
            raise UserError(
                f"{term.where}.schedule needs the number of optimiser steps of the whole training: "
                "give `steps`."
            )


def _teacher(given: Any, student: nn.Module, device: torch.device, precision: str) -> Teacher:
    """What teaches, out of what a user has.

    Raises:
        UserError: it cannot teach.
    """
    if isinstance(given, list | tuple) and given:
        members = [_teacher(one, student, device, precision) for one in given]
        for one in members:
            if not isinstance(one, LiveTeacher):
                raise UserError(
                    "The members of an ensemble are checkpoints or models, and one of them is of "
                    f"the type {type(one).__name__}."
                )
        lives = [one for one in members if isinstance(one, LiveTeacher)]
        return EnsembleTeacher(lives) if len(lives) > 1 else lives[0]
    if isinstance(given, str | Path):
        given = FrozenModel.from_checkpoint(given, device=device, where="teacher")
    elif isinstance(given, nn.Module):
        model = unwrap(given)
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in model.parameters()):
            raise UserError(
                "Teacher and student share weights, and those of a teacher are frozen: give a copy "
                "(copy.deepcopy) as the teacher."
            )
        given = FrozenModel(model.to(device), Units({}, {}), OUTPUTS)
    if isinstance(given, FrozenModel):
        return LiveTeacher(given, precision)
    if not callable(getattr(given, "teach", None)):
        raise UserError(
            f"The teacher is a {type(given).__name__}: give the path of a checkpoint, a model or a "
            "fairchem_kd.Teacher."
        )
    return given


def _first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.natoms)
        if seen >= samples:
            return
    if not seen:
        raise UserError("fit: there is no batch, so that no statistics can be had; give some.")
