"""What a distilled training has beyond a plain one: teacher, taps, loss terms, projections.

Built once, when training starts. None of it is part of the student: its parameters have an
optimiser of their own, and its state a key of its own in the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.distillation.projections import Projections
from fairchem_kd.distillation.statistics import Collate, fit_statistics
from fairchem_kd.distillation.values import Values
from fairchem_kd.errors import UserError
from fairchem_kd.features import Captured, FeatureExtractor, Request
from fairchem_kd.losses import Labels, Loss, LossInputs, Part
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import ATOM_ENERGY, Taught, Teacher
from fairchem_kd.training.ranks import all_sum, world_size

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch


#: In logs and records: the share of structures for which the teacher's word does not count.
UNTRUSTED = "untrusted"


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
        self.statistics_samples = config.statistics_samples
        self.teacher = teacher
        self.units = units
        self.max_force = config.rattle.max_force if config.rattle is not None else None
        self.last_step = last_step
        self.device = device

        terms = list(self.terms.values())
        labels = Labels(label_losses, outputs)
        self._outputs = sorted({name for term in terms for name in term.compared_outputs(labels)})
        teacher.require_outputs(self._outputs)
        self._atom_energy = any(term.needs_atom_energy for term in terms)
        wanted = self._requests("student", lambda own: FeatureExtractor(student, own))
        self.student_tap = FeatureExtractor(student, wanted)
        self.teacher_requests = self._requests("teacher", teacher.specs)
        teacher_specs = teacher.specs(self.teacher_requests)
        generator = torch.Generator().manual_seed(seed)
        for term in terms:
            term.build(self.student_tap.specs, teacher_specs, generator, labels)
        self.modules = nn.ModuleList(terms).to(device)

        self.projections = Projections(
            self.modules,
            config.projections,
            learning_rate=learning_rate,
            clip_grad_norm=clip_grad_norm,
        )
        self.values = Values()

    def _requests(
        self, side: Literal["student", "teacher"], specs: Callable[[list[Request]], Any]
    ) -> list[Request]:
        """What the terms want of one model, each term's refused under its own name."""
        wanted: list[Request] = []
        for term in self.terms.values():
            own = term.student_requests() if side == "student" else term.teacher_requests()
            if term.needs_atom_energy:
                own = [*own, ATOM_ENERGY]
            try:
                specs(own)
            except UserError as error:
                raise UserError(f"{term.where}.{side}: {error}") from None
            wanted += own
        return wanted

    @property
    def compares_energies(self) -> bool:
        """Whether a term compares the teacher's energies with the student's."""
        return "energy" in self._outputs or self._atom_energy

    # -- one step ---------------------------------------------------------------------------------

    def tap_student(self) -> AbstractContextManager[Captured]:
        """A context in which one forward of the student leaves its features behind."""
        return self.student_tap.capture()

    def loss(self, batch: Batch, out: dict[str, Tensor], features: Captured, step: int) -> Tensor:
        """The weighted sum of all terms on one batch, averaged over the elements of all ranks.

        One all-reduce carries the counts and the sums of every term. The result is multiplied by
        the number of ranks, because DDP averages gradients over them.
        """
        with torch.autocast(self.device.type, enabled=False):
            inputs = self._inputs(batch, out, features)
            parts = {
                f"{name}.{part.name}" if part.name else name: (self._weight(term, step), part)
                for name, term in self.terms.items()
                for part in term(inputs)
            }
            noted: dict[str, Part] = {}
            if (
                inputs.systems is not None and "rattled" in batch
            ):  # the share of the copies that counts
                kept = (inputs.systems & batch.rattled).sum()
                noted["rattle"] = Part("", 1.0, kept, batch.rattled.sum())
            summed = [*(part for _, part in parts.values()), *noted.values()]
            totals = torch.stack([part.total.double() for part in summed])
            counts = torch.stack([self._count(part.count) for part in summed])
            sums = all_sum(torch.cat([counts, totals.detach()]))
            counts, means = sums.chunk(2)
            counts = counts.clamp(min=1.0)
            means = means / counts
            weights = [weight * part.weight for weight, part in parts.values()]
            weight = torch.tensor(weights, dtype=torch.float64).to(self.device, non_blocking=True)
            own = slice(len(parts))
            self._note(parts, means[own], weight)
            for name, value in zip(noted, means[len(parts) :], strict=True):
                self.values.note(name, value)
            self.values.end_step()
            return (weight * totals[own] * (world_size() / counts[own])).sum().float()

    def _note(self, names: Iterable[str], values: Tensor, weights: Tensor) -> None:
        """Note each term's raw and weighted value."""
        for name, value, weighted in zip(names, values, weights * values, strict=True):
            self.values.note(name, value)
            self.values.note(f"{name}_weighted", weighted)

    def _weight(self, term: Loss, step: int) -> float:
        return term.coefficient * term.schedule.factor(step, self.last_step)

    def _count(self, count: Tensor | int | None) -> Tensor:
        if count is None:  # a plain sum over ranks: their counts add up to one
            count = 1.0 / world_size()  # type: ignore[assignment]
        return torch.as_tensor(count, dtype=torch.float64).to(self.device, non_blocking=True)

    def _inputs(self, batch: Batch, out: dict[str, Tensor], student: Captured) -> LossInputs:
        needed = bool(self._outputs) or ("rattled" in batch and self.max_force is not None)
        taught = self.teacher.teach(batch, self.teacher_requests, outputs=needed)
        taught = taught.sound(self._outputs)
        if taught.trusted is not None:
            self.values.note(UNTRUSTED, 1.0 - taught.trusted.double().mean())
        inputs = LossInputs(
            batch,
            student={r: student[r].values for r in self.student_tap.specs},
            teacher=taught.features,
            student_outputs=out,
            systems=self._counting(batch, taught),
        )
        inputs.teacher_outputs = {
            name: self.units.normalized(name, values.view_as(out[name]), batch).float()
            for name, values in taught.outputs.items()
            if name in self._outputs
        }
        if self._atom_energy:
            assert taught.atom_energy is not None
            inputs.student_atom_energy = inputs.student[ATOM_ENERGY]
            inputs.teacher_atom_energy = self.units.normalized_atom_energies(
                taught.atom_energy, batch
            ).float()
        return inputs

    def _counting(self, batch: Batch, taught: Taught) -> Tensor | None:
        """``(B,)``: all but what the teacher cannot be trusted on; None: all.

        Of rattled copies, those on which its largest force exceeds the limit do not count.
        """
        if "rattled" not in batch or self.max_force is None or "forces" not in taught.outputs:
            return taught.trusted
        norms = taught.outputs["forces"].view(-1, 3).norm(dim=1)
        largest = norms.new_zeros(len(batch.natoms)).scatter_reduce(0, batch.batch, norms, "amax")
        counting = ~batch.rattled | (largest <= self.max_force)
        return counting if taught.trusted is None else counting & taught.trusted

    # -- statistics and state ---------------------------------------------------------------------

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
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "terms": {name: term.state_dict() for name, term in self.terms.items()},
            "optimizer": self.projections.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state (None: that of a run without distillation).

        Raises:
            UserError: it belongs to another teacher, or to other terms.
        """
        saved = state["identity"] if state is not None else {}
        for key, value in self.identity.items():
            if saved.get(key) != value:
                raise UserError(
                    f"task.distillation.{key}: this run was started with another one, so it cannot "
                    "be resumed: give the same as then, or start a new run."
                )
        assert state is not None
        for name, term in self.terms.items():
            term.load_state_dict(state["terms"][name])
        self.projections.load_state_dict(state["optimizer"])
