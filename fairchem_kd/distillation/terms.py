"""What a distilled training has beyond a plain one: teacher, taps, loss terms, projections.

Built once, when training starts. None of it is part of the student: its parameters have an
optimiser of their own, and its state a key of its own in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from torch import Tensor, nn
from tqdm import tqdm

from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.errors import UserError
from fairchem_kd.features import Captured, FeatureExtractor, Request
from fairchem_kd.losses import Loss, LossInputs, Part
from fairchem_kd.models.frozen import Teacher, TeacherOutput
from fairchem_kd.models.units import Units
from fairchem_kd.training.checks import check_finite
from fairchem_kd.training.ranks import all_sum, average_gradients, world_size

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch

ATOM_ENERGY = Request("atom_energy", "node")
Collate = Callable[[list[Any]], "Batch"]


class Distillation:
    """Teacher, taps, loss terms and projections of one training.

    Args:
        config: the validated ``task.distillation`` block.
        student: the bare student (what DDP wraps), in whose forward its features are tapped.
        teacher: the frozen teacher.
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
        for term in terms:
            term.set_label_losses(label_losses, outputs)
        self._outputs = sorted({name for term in terms for name in term.needs_outputs})
        teacher.require_outputs(self._outputs)
        self._atom_energy = any(term.needs_atom_energy for term in terms)
        self.student_tap = self._tap(student, "student")
        self.teacher_tap = self._tap(teacher.model, "teacher")
        generator = torch.Generator().manual_seed(seed)
        for term in terms:
            term.build(self.student_tap.specs, self.teacher_tap.specs, generator)
        self.modules = nn.ModuleList(terms).to(device)

        optim = config.projections
        self.learning_rate = optim.lr or learning_rate
        self.clip_grad_norm = optim.clip_grad_norm or clip_grad_norm
        self.weight_decay = optim.weight_decay
        self.parameters = list(self.modules.parameters())
        self.optimizer = (
            torch.optim.AdamW(self.parameters, self.learning_rate, weight_decay=self.weight_decay)
            if self.parameters
            else None
        )
        self._values: dict[str, Tensor] = {}
        self._steps = 0

    def _tap(self, model: nn.Module, side: Literal["student", "teacher"]) -> FeatureExtractor:
        wanted: list[Request] = []
        for term in self.terms.values():
            own = term.student_requests() if side == "student" else term.teacher_requests()
            if term.needs_atom_energy:
                own = [*own, ATOM_ENERGY]
            try:
                FeatureExtractor(model, own)
            except UserError as error:
                raise UserError(f"{term.where}.{side}: {error}") from None
            wanted += own
        return FeatureExtractor(model, wanted)

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
            if inputs.systems is not None:  # the share of the copies that counts, for the records
                kept = (inputs.systems & batch.rattled).sum()
                parts["rattle"] = (0.0, Part("", 1.0, kept, batch.rattled.sum()))
            totals = torch.stack([part.total.double() for _, part in parts.values()])
            counts = torch.stack([self._count(part.count) for _, part in parts.values()])
            sums = all_sum(torch.cat([counts, totals.detach()]))
            counts, values = sums.chunk(2)
            counts = counts.clamp(min=1.0)
            weights = [weight * part.weight for weight, part in parts.values()]
            weight = torch.tensor(weights, dtype=torch.float64).to(self.device, non_blocking=True)
            self._note(list(parts), values / counts, weight)
            return (weight * totals * (world_size() / counts)).sum().float()

    def _weight(self, term: Loss, step: int) -> float:
        return term.coefficient * term.schedule.factor(step, self.last_step)

    def _count(self, count: Tensor | int | None) -> Tensor:
        if count is None:  # a plain sum over ranks: their counts add up to one
            count = 1.0 / world_size()  # type: ignore[assignment]
        return torch.as_tensor(count, dtype=torch.float64).to(self.device, non_blocking=True)

    def _inputs(self, batch: Batch, out: dict[str, Tensor], student: Captured) -> LossInputs:
        taught = self.teacher.forward(batch, self.teacher_tap)
        inputs = LossInputs(
            batch,
            student={r: student[r].values for r in self.student_tap.specs},
            teacher=self._features(taught),
            student_outputs=out,
        )
        # In float64: references of total energies are orders larger than what is compared.
        taught.raw = {name: value.double() for name, value in taught.raw.items()}
        rattled = "rattled" in batch
        physical = self.teacher.denormalized(taught, batch) if self._outputs or rattled else {}
        if rattled:
            inputs.systems = self._trusted(batch, physical)
        if self._outputs:
            inputs.teacher_outputs = {
                name: self.units.normalized(name, physical[name].view_as(out[name]), batch).float()
                for name in self._outputs
            }
        if self._atom_energy:
            energies = inputs.teacher[ATOM_ENERGY].double()
            physical_energies = self.teacher.units.physical_atom_energies(energies, batch)
            inputs.student_atom_energy = inputs.student[ATOM_ENERGY]
            inputs.teacher_atom_energy = self.units.normalized_atom_energies(
                physical_energies, batch
            ).float()
        return inputs

    def _trusted(self, batch: Batch, physical: dict[str, Tensor]) -> Tensor | None:
        """``(B,)``: all but the copies on which the teacher's largest force exceeds the limit."""
        if self.max_force is None or "forces" not in physical:
            return None
        norms = physical["forces"].view(-1, 3).norm(dim=1)
        largest = norms.new_zeros(len(batch.natoms)).scatter_reduce(0, batch.batch, norms, "amax")
        return ~batch.rattled | (largest <= self.max_force)

    def _features(self, taught: TeacherOutput) -> dict[Request, Tensor]:
        assert taught.features is not None
        return {r: taught.features[r].values for r in self.teacher_tap.specs}

    # -- values for the records -------------------------------------------------------------------

    def _note(self, names: list[str], values: Tensor, weights: Tensor) -> None:
        """Add one step's values, on the device: reading them is what waits for it."""
        for name, value, weighted in zip(names, values, weights * values, strict=True):
            noted_as = {name: value}
            if name != "rattle":
                noted_as[f"{name}_weighted"] = weighted
            for key, noted in noted_as.items():
                self._values[key] = self._values.get(key, 0.0) + noted.detach()
        self._steps += 1

    def read_values(self) -> dict[str, float]:
        """Each term's raw and weighted value, a mean over the steps since the last reading."""
        means = {name: float(value) / self._steps for name, value in self._values.items()}
        self._values, self._steps = {}, 0
        return means

    @contextmanager
    def values_apart(self) -> Iterator[None]:
        """Within the block, values are kept apart from those of the training steps around it."""
        values, steps = self._values, self._steps
        self._values, self._steps = {}, 0
        try:
            yield
        finally:
            self._values, self._steps = values, steps

    # -- the projections' optimiser ---------------------------------------------------------------

    def zero_grad(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(self, rate: float, scaler: torch.amp.GradScaler | None) -> None:
        """Step the projections: gradients averaged over ranks, unscaled, clipped by themselves.

        Args:
            rate: the student's learning rate over its initial one.
            scaler: the AMP scaler with which the loss was scaled.
        """
        if self.optimizer is None:
            return
        average_gradients(self.parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
        if scaler is not None:
            scaler.step(self.optimizer)  # the trainer updates the scaler after the student's step
        else:
            self.optimizer.step()

    # -- statistics and state ---------------------------------------------------------------------

    @torch.no_grad()
    def fit_statistics(self, dataset: Dataset, collate: Collate) -> None:
        """Fix the standardisation on evenly spread training samples, on the first rank for all."""
        fitted = [term for term in self.terms.values() if term.needs_statistics]
        if not fitted:
            return
        error = [""]  # told to the other ranks, which would wait for the statistics
        if distutils.is_master():
            try:
                self._fit(fitted, dataset, collate)
            except UserError as refusal:
                error[0] = str(refusal)
        distutils.broadcast_object_list(error, src=0, device=self.device)
        if error[0]:
            raise UserError(error[0])
        if world_size() > 1:
            for buffer in self.modules.buffers():
                dist.broadcast(buffer, src=0)

    def _fit(self, terms: list[Loss], dataset: Dataset, collate: Collate) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        number = min(self.statistics_samples, count)
        samples = [i * count // number for i in range(number)]
        logging.info(f"Standardising the teacher's features on {number} training samples")
        for start in tqdm(range(0, number, 16), desc="standardise", disable=None):
            batch = collate([dataset[i] for i in samples[start : start + 16]])
            check_finite(batch, ())
            self.teacher.check_elements(batch.atomic_numbers)
            batch = batch.to(self.device)
            features = self._features(self.teacher.forward(batch, self.teacher_tap))
            for term in terms:
                term.update_statistics(features, batch)
        for term in terms:
            term.finalize_statistics()

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
            "teacher": _fingerprint(self.teacher.model),
            "statistics_samples": self.statistics_samples,
            "losses": terms,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "terms": {name: term.state_dict() for name, term in self.terms.items()},
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
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
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.weight_decay


def _fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
