"""What a distilled training has beyond a plain one: teacher, taps, loss terms, projections.

Built once, when training starts. None of it is part of the student: its parameters have an
optimiser of their own, and its state a key of its own in the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairchem_kd.distillation.agreement import Agreement, agreement
from fairchem_kd.distillation.balance import FACTOR, Balance
from fairchem_kd.distillation.comparing import Compared, Comparing
from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.distillation.ensembles import EnsembleOptions, Spreads
from fairchem_kd.distillation.gradients import gradients_of_terms
from fairchem_kd.distillation.projections import Projections
from fairchem_kd.distillation.statistics import Collate, fit_statistics
from fairchem_kd.distillation.values import Values
from fairchem_kd.distillation.zero import EnergyZero, fit_zero
from fairchem_kd.errors import UserError
from fairchem_kd.features import (
    Captured,
    FeatureExtractor,
    Request,
    atom_energy,
    common_energy,
    energy_name_of,
)
from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.losses import Labels, Loss, Part
from fairchem_kd.models.units import Units
from fairchem_kd.stock.positions import followed
from fairchem_kd.teachers import EnsembleTeacher, Teacher
from fairchem_kd.teachers.slopes import live_members
from fairchem_kd.training.ranks import all_sum, rank, refused_by_all, world_size

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch


#: In logs and records: the share of structures for which the teacher's word does not count.
UNTRUSTED = "untrusted"
#: The loss of the labels, weighted as it counts.
LABEL_LOSS = "label_loss"
#: What a run's identity was before a key of it was there.
_BEFORE = {"teacher.energy_zero": "teacher"}


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """``(n,)``, float64, of numbers ``()``; in one go where they are of one type."""
    if len({value.dtype for value in values}) == 1:
        return torch.stack(list(values)).double()
    return torch.stack([value.double() for value in values])


def _given(identity: Any) -> Any:
    """Without what is null: an option that was not there when a run began is null now."""
    if not isinstance(identity, dict):
        return identity
    return {key: _given(value) for key, value in identity.items() if value is not None}


class Distillation:
    """Teacher, taps, loss terms and projections of one training.

    Args:
        config: the validated ``task.distillation`` block.
        student: the bare student (what DDP wraps), in whose forward its features are tapped.
        teacher: what teaches.
        units: the student's normalisers and element references.
        label_losses: the trainer's ``(target, {"fn", "coefficient"})`` pairs.
        outputs: the trainer's ``output_targets``.
        learning_rate: of the projections, where the config gives none.
        clip_grad_norm: of the projections, where the config gives none.
        seed: of the projections' own random generator.
        last_step: the last optimiser step of the run, where schedules end.

    Raises:
        UserError: a pairing that cannot work, naming the key of the term.
    """

    def __init__(
        self,
        config: DistillationConfig,
        student: nn.Module,
        teacher: Teacher,
        units: Units,
        *,
        label_losses: Sequence[tuple[str, dict[str, Any]]],
        outputs: dict[str, dict[str, Any]],
        learning_rate: float,
        clip_grad_norm: float | None,
        seed: int,
        last_step: int,
        device: torch.device,
    ) -> None:
        self.terms = config.active_terms
        self.labels = config.labels
        self.diagnostics = config.diagnostics
        self.statistics_samples = config.statistics_samples
        self.student = student
        self.teacher = teacher
        self.units = units
        self.targets = outputs
        self.last_step = last_step
        self.device = device
        self._check_schedules()

        terms = list(self.terms.values())
        energy = common_energy(energy_name_of(student), teacher.energy_name)
        self._labels = labels = Labels(label_losses, outputs, teacher.levels, energy)
        self._outputs = sorted({name for term in terms for name in term.compared_outputs(labels)})
        teacher.require_outputs(self._outputs)
        self._atom_energies = sorted(
            {name for term in terms for name in term.compared_atom_energies(labels)}
        )
        wanted = self._requests("student", lambda own: FeatureExtractor(student, own))
        self.student_tap = FeatureExtractor(student, wanted)
        self.teacher_requests = self._requests("teacher", teacher.specs)
        teacher_specs = teacher.specs(self.teacher_requests)
        generator = torch.Generator().manual_seed(seed)
        for term in terms:
            term.build(self.student_tap.specs, teacher_specs, generator, labels)
        self.modules = nn.ModuleList(terms).to(device)
        self.needs_slopes = any(term.needs_slopes for term in terms)
        if self.needs_slopes:
            live_members(teacher)  # refuses one without a model

        self.projections = Projections(
            self.modules,
            config.projections,
            learning_rate=learning_rate,
            clip_grad_norm=clip_grad_norm,
        )
        balancing = config.balancing
        self.balance = Balance(balancing, self.terms, device) if balancing is not None else None
        self.values = Values()
        self.zero_of = config.teacher.energy_zero
        self.zero: EnergyZero | None = None
        self.spreads: Spreads | None = None
        if isinstance(teacher, EnsembleTeacher):
            given = config.teacher.ensemble or EnsembleOptions()
            compared = dict.fromkeys([*self._outputs, *self._atom_energies])
            self.spreads = Spreads(given, list(compared), teacher.levels)
        self.comparing = Comparing(
            units,
            outputs=self._outputs,
            atom_energies=self._atom_energies,
            student=list(self.student_tap.specs),
            teacher=self.teacher_requests,
            max_force=config.rattle.max_force if config.rattle is not None else None,
            spreads=self.spreads,
            slopes=self.needs_slopes,
        )

    def _requests(
        self, side: Literal["student", "teacher"], specs: Callable[[list[Request]], Any]
    ) -> list[Request]:
        """What the terms want of one model, each term's refused under its own name."""
        wanted: list[Request] = []
        for term in self.terms.values():
            own = term.student_requests() if side == "student" else term.teacher_requests()
            own = [*own, *map(atom_energy, term.compared_atom_energies(self._labels))]
            try:
                specs(own)
            except UserError as error:
                raise UserError(f"{term.where}.{side}: {error}") from None
            wanted += own
        return wanted

    def _check_schedules(self) -> None:
        """Refuse a training with steps at which nothing is learned.

        Raises:
            UserError: naming the first such step.
        """
        schedules = [term.schedule for term in self.terms.values()]
        if self.labels.coefficient > 0:
            schedules.append(self.labels.schedule)
        ends = {0, *(place for one in schedules for place in one.span(self.last_step))}
        for step in sorted(place + 1 for place in ends if place < self.last_step):
            if not any(one.runs(step, self.last_step) for one in schedules):
                raise UserError(
                    f"task.distillation: at step {step} of {self.last_step} neither the labels nor "
                    "a loss counts, by their schedules' start and stop: let one of them go on."
                )

    @property
    def compares_energies(self) -> bool:
        """Whether a term compares the teacher's energies with the student's."""
        return "energy" in self._outputs or "energy" in self._atom_energies

    @property
    def not_taught(self) -> list[str]:
        """Targets of the training loss that the teacher does not predict."""
        learned = {name for name, loss in self._labels.losses if float(loss["coefficient"]) > 0}
        return sorted(learned - self.teacher.levels.keys())

    # -- one step ---------------------------------------------------------------------------------

    def running(self, step: int) -> dict[str, Loss]:
        """The terms that count at a step, by their schedules."""
        return {n: t for n, t in self.terms.items() if t.schedule.runs(step, self.last_step)}

    def trains_projections(self, step: int) -> bool:
        """Whether a term that counts at a step has parameters of its own."""
        return any(len(list(term.parameters())) for term in self.running(step).values())

    def label_factor(self, step: int) -> float:
        """What the labels' loss is multiplied by at a step."""
        return self.labels.coefficient * self.labels.schedule.factor(step, self.last_step)

    @contextmanager
    def tap_student(self, batch: Batch | None = None) -> Iterator[Captured]:
        """A context in which one forward of the student leaves its features behind.

        Args:
            batch: what it will be run on; where a term differentiates forces, its positions, moved
                to the device, get a graph.
        """
        follows: AbstractContextManager[None] = nullcontext()
        if batch is not None and self.needs_slopes and torch.is_grad_enabled():
            batch.pos = batch.pos.to(self.device).detach().requires_grad_(True)
            follows = followed(backbone_of(self.student))
        with follows, self.student_tap.capture() as features:
            yield features

    def loss(
        self,
        batch: Batch,
        out: dict[str, Tensor],
        features: Captured,
        step: int,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the running terms on one batch, over the elements of all ranks.

        One all-reduce carries the counts and the sums of every term. The result is multiplied by
        the number of ranks, because DDP averages gradients over them. ``labels``, the labels' loss
        as it counts, is noted alone.
        """
        with torch.autocast(self.device.type, enabled=False):
            found = self.compared(batch, out, features)
            if found.trusted is not None:
                self.values.note((UNTRUSTED,), 1.0 - found.trusted.double().mean().view(1))
            inputs = found.inputs
            inputs.step = step
            parts: dict[str, tuple[float, Part]] = {}
            noted: dict[str, Part] = {}
            for name, term in self.running(step).items():
                for part in term(inputs):
                    full = f"{name}.{part.name}" if part.name else name
                    if part.weight is None:
                        noted[full] = part
                    else:
                        parts[full] = self._weight(term, step) * part.weight, part
            if labels is not None:
                noted[LABEL_LOSS] = Part("", 1.0, labels.detach(), 1)
            if (
                inputs.systems is not None and "rattled" in batch
            ):  # the share of the copies that counts
                kept = (inputs.systems & batch.rattled).sum()
                noted["rattle"] = Part("", 1.0, kept, batch.rattled.sum())
            noted |= found.noted
            summed = [*(part for _, part in parts.values()), *noted.values()]
            totals = _stacked([part.total for part in summed])
            # a plain sum over ranks: their counts add up to one
            counts = self._counts(
                [1.0 / world_size() if p.count is None else p.count for p in summed]
            )
            sums = all_sum(torch.cat([counts, totals.detach()]))
            counts, means = sums.chunk(2)
            counts = counts.clamp(min=1.0)
            means = means / counts
            weights = [weight for weight, _ in parts.values()]
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

    def compared(self, batch: Batch, out: dict[str, Tensor], features: Captured) -> Compared:
        """What the teacher says of a batch, beside what the student gave."""
        return self.comparing(self.teacher, self.zero, batch, out, features)

    def _balanced(
        self, balance: Balance, weights: Tensor, means: Tensor, names: Sequence[str], step: int
    ) -> Tensor:
        """Weights of parts ``(P,)`` times the factors of their terms, which learn from the means.

        A validation learns nothing.
        """
        terms = [name.partition(".")[0] for name in names]
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
        """Note each term's raw and weighted value."""
        both = tuple(full for name in names for full in (name, f"{name}_weighted"))
        self.values.note(both, torch.stack([values, weights * values], dim=1).flatten())

    def _weight(self, term: Loss, step: int) -> float:
        return term.coefficient * term.schedule.factor(step, self.last_step)

    def _counts(self, counts: Sequence[Tensor | float]) -> Tensor:
        """``(n,)``, float64; in one go to the device where none of them is there."""
        numbers = [0.0 if isinstance(count, Tensor) else count for count in counts]
        known = torch.tensor(numbers, dtype=torch.float64).to(self.device, non_blocking=True)
        if not any(isinstance(count, Tensor) for count in counts):
            return known
        return torch.stack(
            [c.double() if isinstance(c, Tensor) else k for c, k in zip(counts, known, strict=True)]
        )

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse atoms, ``(N,)``, of which the teacher, or its zero, says nothing.

        Raises:
            UserError: naming the elements.
        """
        self.teacher.check_elements(atomic_numbers)
        if self.zero is not None:
            self.zero.check_elements(atomic_numbers)

    # -- statistics and state ---------------------------------------------------------------------

    def fit_zero(self, dataset: Dataset, collate: Collate) -> None:
        """Fit the zero of the teacher's energies to labels, on the first rank for all.

        Raises:
            UserError: on every rank: there are no labels, or too few.
        """
        shifts = torch.zeros(120, dtype=torch.float64)
        with refused_by_all():
            if rank() == 0:
                shifts = fit_zero(
                    self.teacher, self.teacher_requests, dataset, collate, self.device
                ).shifts
        if world_size() > 1:
            shifts = shifts.to(self.device)
            dist.broadcast(shifts, src=0)
        self.zero = EnergyZero(shifts.cpu())

    def fit_spreads(self, dataset: Dataset, collate: Collate) -> None:
        """Calibrate the spread of an ensemble on labels, on the first rank for all.

        Raises:
            UserError: on every rank: its members are not such as can be compared.
        """
        if self.spreads is None or not isinstance(self.teacher, EnsembleTeacher):
            return
        shifted = None if self.zero is None else self.zero.applied
        self.spreads.fit_on_first(
            self.teacher, self.teacher_requests, dataset, collate, self.device, shifted
        )

    def agreement(self, dataset: Dataset, collate: Collate) -> Agreement | None:
        """How the teacher does on labels; None where nothing can be compared."""
        shifted = None if self.zero is None else self.zero.applied
        return agreement(
            self.teacher, self.teacher_requests, dataset, collate, self.device, shifted
        )

    def fit_statistics(self, dataset: Dataset, collate: Collate) -> None:
        """Fix the standardisation of the teacher's features on training samples."""
        fit_statistics(
            list(self.terms.values()),
            self.teacher,
            self.teacher_requests,
            dataset,
            collate,
            samples=self.statistics_samples,
            device=self.device,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a saved state belongs to: the teacher, the statistics' samples and the terms.

        Coefficients, schedules and loss functions may change on resume; what projections and
        statistics were made for may not. Worked out once: the digest reads all of the teacher.
        """
        changeable = ("coefficient", "schedule", "fn", "delta")
        terms = {}
        for name, term in self.terms.items():
            options = dataclasses.asdict(term.options)
            terms[name] = {"kind": term.kind} | {
                key: value for key, value in options.items() if key not in changeable
            }
        return {
            "teacher": self.teacher.identity,
            "statistics_samples": self.statistics_samples,
            "losses": terms,
            "teacher.energy_zero": self.zero_of,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "terms": {name: term.state_dict() for name, term in self.terms.items()},
            "optimizer": self.projections.state_dict(),
        } | self._fitted_state()

    def _fitted_state(self) -> dict[str, Any]:
        """What was fitted to labels, as far as anything was."""
        state: dict[str, Any] = {}
        if self.zero is not None:
            state["energy_zero"] = self.zero.shifts
        if self.spreads is not None:
            state["spreads"] = self.spreads.state_dict()
        if self.balance is not None:
            state["balance"] = self.balance.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state (None: that of a run without distillation).

        Raises:
            UserError: it belongs to another teacher, or to other terms.
        """
        saved = state["identity"] if state is not None else {}
        for key, value in self.identity.items():
            if _given(saved.get(key, _BEFORE.get(key))) != _given(value):
                raise UserError(
                    f"task.distillation.{key}: this run was started with another one, so it cannot "
                    "be resumed: give the same as then, or start a new run."
                )
        assert state is not None
        for name, term in self.terms.items():
            term.load_state_dict(state["terms"][name])
        self.projections.load_state_dict(state["optimizer"])
        if "energy_zero" in state:
            self.zero = EnergyZero(state["energy_zero"].cpu())
        if self.spreads is not None:
            self.spreads.load_state_dict(state["spreads"])
        if self.balance is not None and "balance" in state:
            self.balance.load_state_dict(state["balance"])
