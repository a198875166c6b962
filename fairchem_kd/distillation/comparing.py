"""What both models say of one batch, as the losses see it.

batch -> teacher -> sound, at the labels' zero -> which structures count, and how much
      -> in the student's units, beside what the student gave -> LossInputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairchem_kd.distillation.ensembles import Spreads
from fairchem_kd.distillation.zero import EnergyZero
from fairchem_kd.errors import UserError
from fairchem_kd.features import Captured, Request, atom_energy
from fairchem_kd.losses import LossInputs, Part
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import Taught, Teacher
from fairchem_kd.teachers.slopes import force_slopes

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass(frozen=True)
class Compared:
    """The losses' inputs, and what is noted beside them."""

    inputs: LossInputs
    trusted: Tensor | None  #: ``(B,)``, where the teacher can be relied on; None: everywhere
    noted: dict[str, Part]  #: for the records alone, by name


@dataclass(frozen=True)
class Comparing:
    """What the terms of a training compare, and in which units.

    Attributes:
        units: the student's.
        outputs: names of the outputs that are compared.
        atom_energies: names of the outputs of which atoms' shares are compared.
        student: the student's features.
        teacher: the teacher's features.
        max_force: eV/Å: rattled copies with a larger force do not count; None: all count.
        spreads: of an ensemble.
        slopes: whether a term asks how forces change.
    """

    units: Units
    outputs: Sequence[str]
    atom_energies: Sequence[str]
    student: Sequence[Request]
    teacher: Sequence[Request]
    max_force: float | None
    spreads: Spreads | None
    slopes: bool

    def __call__(
        self,
        teacher: Teacher,
        zero: EnergyZero | None,
        batch: Batch,
        out: dict[str, Tensor],
        features: Captured,
    ) -> Compared:
        """Ask the teacher about a batch, and put what it says beside the student's.

        Args:
            teacher: who is asked.
            zero: what its energies are shifted by.
            batch: of B structures.
            out: the student's outputs, normalised.
            features: the student's.
        """
        of_ensemble = [] if self.spreads is None else list(self.spreads.ratios)
        limited = "rattled" in batch and self.max_force is not None
        needed = bool(self.outputs) or bool(of_ensemble) or limited
        taught = teacher.teach(batch, self.teacher, outputs=needed)
        taught = taught.sound(dict.fromkeys([*self.outputs, *of_ensemble]))
        if zero is not None:
            taught = zero.applied(taught, batch)
        counting = self._counting(batch, taught)
        weights: dict[str, Tensor] = {}
        noted: dict[str, Part] = {}
        if self.spreads is not None:
            counting, weights, noted = self.spreads.weigh(taught, counting)
        if "mixed" in batch:  # labels and teacher share the structures out
            names = dict.fromkeys([*self.outputs, *self.atom_energies])
            weights = {name: weights.get(name, 1.0) * batch.mixed for name in names}
        inputs = LossInputs(
            batch,
            student={request: features[request].values for request in self.student},
            teacher=taught.features,
            student_outputs=out,
            systems=counting,
            weights=weights,
            teacher_slopes=self._slopes_of(teacher, batch) if self.slopes else None,
        )
        inputs.teacher_outputs = {
            name: self._as_student(name, taught.outputs[name], out[name], batch)
            for name in self.outputs
        }
        normalized = self.units.normalized_atom_energies
        inputs.student_atom_energies = {
            name: inputs.student[atom_energy(name)] for name in self.atom_energies
        }
        inputs.teacher_atom_energies = {
            name: normalized(taught.atom_energies[name], batch, name).float()
            for name in self.atom_energies
        }
        return Compared(inputs, taught.trusted, noted)

    def _slopes_of(
        self, teacher: Teacher, batch: Batch
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """What asks the teacher how its forces change, in the student's normalised units per Å."""

        def slopes(cotangents: Sequence[Tensor]) -> list[Tensor]:
            found = force_slopes(teacher, batch, cotangents)
            nothing = torch.zeros_like(batch.pos, dtype=torch.float64).detach()
            zero = self.units.normalized("forces", nothing, batch)
            return [self.units.normalized("forces", one, batch) - zero for one in found]

        return slopes

    def _as_student(self, name: str, values: Tensor, own: Tensor, batch: Batch) -> Tensor:
        """A teacher's output ``(rows, C)`` in the student's units.

        Raises:
            UserError: it has another shape than the student's ``own``.
        """
        if values.shape != own.shape:
            raise UserError(
                f"{name} of the teacher is {values.shape[1]} numbers for each structure or atom, "
                f"and the student's is {own.shape[1]}: they are not the same; leave {name} out of "
                "the loss (vanilla.targets)."
            )
        return self.units.normalized(name, values, batch).float()

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
