"""What a distilled training has beyond a plain one: teacher, taps and loss terms.

Built once, when training starts. None of it is part of the student: its parameters are no part of
the student's, and its state has a key of its own in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fairchem_kd.distillation.agreement import Agreement, agreement
from fairchem_kd.distillation.balance import Balance
from fairchem_kd.distillation.comparing import Compared, Comparing
from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.distillation.ensembles import EnsembleOptions, Spreads
from fairchem_kd.distillation.identity import check_identity, identity_of
from fairchem_kd.distillation.running import check_schedules
from fairchem_kd.distillation.statistics import Collate, fit_statistics
from fairchem_kd.distillation.summing import Summing
from fairchem_kd.distillation.values import Values
from fairchem_kd.distillation.zero import EnergyZero, fit_zero_on_first
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
from fairchem_kd.stock.gradient_forces import forces_are_slopes
from fairchem_kd.stock.positions import followed
from fairchem_kd.teachers import EnsembleTeacher, Teacher
from fairchem_kd.teachers.slopes import live_members

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch


#: In logs and records: the share of structures for which the teacher's word does not count.
UNTRUSTED = "untrusted"


class Distillation:
    """Teacher, taps and loss terms, with their projections, of one training.

    Args:
        config: the validated ``task.distillation`` block.
        student: the bare student (what DDP wraps), in whose forward its features are tapped.
        teacher: what teaches.
        units: the student's normalisers and element references.
        label_losses: the trainer's ``(target, {"fn", "coefficient"})`` pairs.
        outputs: the trainer's ``output_targets``.
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
        seed: int,
        last_step: int,
        device: torch.device,
    ) -> None:
        self.terms = config.active_terms
        self.labels = config.labels
        self.statistics_samples = config.statistics_samples
        self.student = student
        self.teacher = teacher
        self.units = units
        self.targets = outputs
        self.last_step = last_step
        self.device = device
        check_schedules(self.terms, self.labels, last_step)

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
        self.follows_positions = self.needs_slopes or self._needs_own_slopes(terms)

        balancing = config.balancing
        self.balance = Balance(balancing, self.terms, device) if balancing is not None else None
        self.values = Values()
        self._sum = Summing(
            self.terms,
            student,
            last_step=last_step,
            diagnostics=config.diagnostics,
            balance=self.balance,
            values=self.values,
            device=device,
        )
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

    def _needs_own_slopes(self, terms: Sequence[Loss]) -> bool:
        """Whether a term differentiates the student's forces alone.

        Raises:
            UserError: one does, and they are a slope already.
        """
        wanting = [term.where for term in terms if term.needs_own_slopes]
        if wanting and forces_are_slopes(backbone_of(self.student)):
            raise UserError(
                f"{wanting[0]} lessens what keeps direct forces from being the slope of an energy, "
                "and the student's are a slope: take it out."
            )
        return bool(wanting)

    @property
    def compares_energies(self) -> bool:
        """Whether a term compares the teacher's energies with the student's."""
        return "energy" in self._outputs or "energy" in self._atom_energies

    @property
    def compared_outputs(self) -> tuple[str, ...]:
        """Outputs that terms compare."""
        return tuple(self._outputs)

    @property
    def not_taught(self) -> list[str]:
        """Targets of the training loss that the teacher does not predict."""
        learned = {name for name, loss in self._labels.losses if float(loss["coefficient"]) > 0}
        return sorted(learned - self.teacher.levels.keys())

    # -- one step ---------------------------------------------------------------------------------

    def running(self, step: int) -> dict[str, Loss]:
        """The terms that count at a step, by their schedules."""
        return self._sum.running(step)

    def trained_at(self, step: int) -> list[nn.Parameter]:
        """The parameters of the terms that count at a step, by their schedules."""
        return [p for term in self.running(step).values() for p in term.parameters()]

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
        if batch is not None and self.follows_positions and torch.is_grad_enabled():
            batch.pos = batch.pos.to(self.device).detach().requires_grad_(True)
            follows = followed(self.student)
        with follows, self.student_tap.capture() as features:
            yield features

    def loss(
        self,
        batch: Batch,
        out: Mapping[str, Tensor],
        features: Captured,
        step: int,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the running terms on one batch, over the elements of all ranks.

        The result is multiplied by the number of ranks, because DDP averages gradients over them.
        ``labels``, the labels' loss as it counts, is noted alone.
        """
        with torch.autocast(self.device.type, enabled=False):
            found = self.compared(batch, out, features)
            if found.trusted is not None:
                share = 1.0 - found.trusted.double().mean().view(1)
                self.values.note((UNTRUSTED,), share, rare=True)
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
                        parts[full] = part.weight, part
            if (
                inputs.systems is not None and "rattled" in batch
            ):  # the share of the copies that counts
                kept = (inputs.systems & batch.rattled).sum()
                noted["rattle"] = Part("", 1.0, kept, batch.rattled.sum())
            return self._sum(parts, noted | found.noted, step, labels)

    def compared(self, batch: Batch, out: Mapping[str, Tensor], features: Captured) -> Compared:
        """What the teacher says of a batch, beside what the student gave."""
        return self.comparing(self.teacher, self.zero, batch, dict(out), features)

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
        self.zero = fit_zero_on_first(
            self.teacher, self.teacher_requests, dataset, collate, self.device
        )

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
        """What a saved state belongs to; worked out once, for it may read all of the teacher."""
        return identity_of(
            self.terms,
            teacher=self.teacher.identity,
            samples=self.statistics_samples,
            zero=self.zero_of,
        )

    def state_dict(self) -> dict[str, Any]:
        """Projections and statistics, what was fitted to labels, and what they belong to."""
        state: dict[str, Any] = {
            "identity": self.identity,
            "terms": {name: term.state_dict() for name, term in self.terms.items()},
        }
        if self.zero is not None:
            state["energy_zero"] = self.zero.shifts
        if self.spreads is not None:
            state["spreads"] = self.spreads.state_dict()
        if self.balance is not None:
            state["balance"] = self.balance.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it belongs to another teacher, or to other terms.
        """
        check_identity(state["identity"], self.identity)
        for name, term in self.terms.items():
            term.load_state_dict(state["terms"][name])
        if "energy_zero" in state:
            self.zero = EnergyZero(state["energy_zero"].cpu())
        if self.spreads is not None and "spreads" in state:
            self.spreads.load_state_dict(state["spreads"])
        if self.balance is not None and "balance" in state:
            self.balance.load_state_dict(state["balance"])
