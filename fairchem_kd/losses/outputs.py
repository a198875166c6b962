"""Losses on outputs: energy and forces (vanilla), and energies per atom (arXiv 2306.14818, sec. 3).

Teacher and student are compared in the student's normalised units, as labels and student are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.losses.base import (
    ElementwiseOptions,
    Labels,
    Loss,
    LossInputs,
    LossOptions,
    Part,
    masked_sum,
    register_loss,
)
from fairchem_kd.losses.elementwise import FUNCTIONS, elementwise
from fairchem_kd.schema import option

if TYPE_CHECKING:
    from fairchem_kd.features import FeatureSpec, Request

TARGETS = ("energy", "forces")


@dataclass
class VanillaOptions(LossOptions):
    """Options of vanilla."""

    energy: float | None = option(
        None, ge=0, help="coefficient of the energy; default: that of the training loss"
    )
    forces: float | None = option(
        None, ge=0, help="coefficient of the forces; default: that of the training loss"
    )


class _Compared(NamedTuple):
    target: str
    name: str  # of the part
    weight: float
    fn: Any  # the elementwise loss inside fairchem's DDPLoss
    mean: bool
    per_atom: bool
    free_atoms: bool


@register_loss("vanilla")
class Vanilla(Loss):
    """``cE * loss_E(E_s, E_t) + cF * loss_F(F_s, F_t)`` with the functions of the training loss.

    Functions, reductions, coefficients and the choice of free atoms are those with which the
    labels are learned. Several functions on one target share a coefficient given here in the
    proportions of their own.
    """

    Options = VanillaOptions

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self._compared: list[_Compared] | None = None

    @classmethod
    def options_for(cls, outputs: Collection[str]) -> dict[str, Any]:
        return {} if "forces" in outputs else {"forces": 0.0}  # energies alone

    @property
    def needs_outputs(self) -> tuple[str, ...]:
        return tuple(t for t in TARGETS if getattr(self.options, t) != 0)

    def compared_outputs(self, labels: Labels) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.target for c in self._compare(labels)))

    def build(
        self,
        student_specs: Mapping[Request, FeatureSpec],
        teacher_specs: Mapping[Request, FeatureSpec],
        generator: torch.Generator,
        labels: Labels | None = None,
    ) -> None:
        if labels is not None:
            self._compared = self._compare(labels)

    def _compare(self, labels: Labels) -> list[_Compared]:
        """What is compared, and how, in a training with these labels."""
        compared: list[_Compared] = []
        for target in TARGETS:
            own = getattr(self.options, target)
            infos = [info for name, info in labels.losses if name == target]
            if own and not infos:
                raise UserError(
                    f"{self.where}.{target} is {own:g}, but loss_functions has no {target} loss "
                    "whose function could be used; add one or remove the key."
                )
            whole = sum(float(info["coefficient"]) for info in infos)
            for number, info in enumerate(infos):
                weight = float(info["coefficient"])
                if own is not None:
                    weight = own * (weight / whole if whole > 0 else 1 / len(infos))
                if weight == 0:
                    continue
                # only atoms have a mask; a system's energy is that of all its atoms
                output = labels.outputs[target]
                per_atom = output.get("level") == "atom"
                compared.append(
                    _Compared(
                        target,
                        target if len(infos) == 1 else f"{target}{number}",
                        weight,
                        info["fn"].loss_fn,
                        info["fn"].reduction == "mean",
                        per_atom,
                        per_atom and bool(output.get("train_on_free_atoms", True)),
                    )
                )
        if not compared:
            raise UserError(
                f"{self.where}: vanilla has neither energy nor forces to compare; give "
                "loss_functions one of them with a coefficient above 0."
            )
        return compared

    def forward(self, inputs: LossInputs) -> list[Part]:
        assert self._compared is not None, "build() with the labels comes before the first batch"
        return [self._part(compared, inputs) for compared in self._compared]

    def _part(self, compared: _Compared, inputs: LossInputs) -> Part:
        student = inputs.student_outputs[compared.target]
        # a half type where the student ran under autocast: a sum over atoms would overflow it
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        teacher = inputs.teacher_outputs[compared.target].detach().to(student.dtype)
        if student.shape != teacher.shape:
            raise ValueError(
                f"{compared.target} of the student {tuple(student.shape)} and of the teacher "
                f"{tuple(teacher.shape)} differ in shape"
            )
        # not DDPLoss.forward: it waits for the device and for the other ranks
        values = compared.fn(student, teacher, inputs.batch.natoms)
        rows = inputs.atoms(free=compared.free_atoms) if compared.per_atom else inputs.systems
        total, count = masked_sum(values, rows)
        return Part(compared.name, compared.weight, total, count if compared.mean else None)


@dataclass
class PerAtomEnergyOptions(ElementwiseOptions):
    """Options of per_atom_energy."""

    fn: str = option("mae", choices=FUNCTIONS, help="how two energies are compared")


@register_loss("per_atom_energy")
class PerAtomEnergy(Loss):
    """The mean over atoms of ``fn(e_s,i, e_t,i)``, the energies before the sum over a system."""

    Options = PerAtomEnergyOptions

    @property
    def needs_atom_energy(self) -> bool:
        return True

    def forward(self, inputs: LossInputs) -> list[Part]:
        student, teacher = inputs.student_atom_energy, inputs.teacher_atom_energy
        if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
            raise ValueError("per_atom_energy needs the energies per atom of both models")
        values = elementwise(self.options.fn, student, teacher.detach(), self.options.delta)
        return [Part("", 1.0, *masked_sum(values, inputs.atoms()))]
