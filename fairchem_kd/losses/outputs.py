"""Losses on outputs: vanilla, and energies per atom (arXiv 2306.14818, sec. 3).

Teacher and student are compared in the student's normalised units, as labels and student are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fairchem_kd.errors import UserError, did_you_mean
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

#: What the options have a key of its own for, in the order in which they are compared.
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
    targets: list[str] | dict[str, float | None] | None = option(
        None,
        help="the targets that are compared, with their coefficients (null: that of the training "
        "loss) or as a list; default: all that the training loss has and the teacher predicts",
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
    """The sum over targets of ``c * loss(y_s, y_t)`` with the functions of the training loss.

    Of energy and forces this is ``cE * loss_E(E_s, E_t) + cF * loss_F(F_s, F_t)``. Functions,
    reductions, coefficients and the choice of free atoms are those with which the labels are
    learned. Several functions on one target share a coefficient given here in the proportions of
    their own.
    """

    Options = VanillaOptions

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self._compared: list[_Compared] | None = None
        given = self.options.targets
        #: the coefficients of targets that are named; None: it goes by what can be compared
        self._named: dict[str, float | None] | None = None
        if given is None:
            return
        self._named = dict.fromkeys(given) if isinstance(given, list) else dict(given)
        own = [name for name in TARGETS if getattr(self.options, name) is not None]
        if own:
            raise UserError(
                f"{where} has both targets and {own[0]}: give the coefficient of {own[0]} in "
                "targets."
            )
        if any(value is not None and value < 0 for value in self._named.values()):
            raise UserError(f"{where}.targets: a coefficient must be at least 0.")

    @classmethod
    def options_for(cls, outputs: Collection[str]) -> dict[str, Any]:
        if "forces" in outputs or "energy" not in outputs:
            return {}
        return {"forces": 0.0}  # energies alone

    @property
    def needs_outputs(self) -> tuple[str, ...]:
        if self._named is not None:
            return tuple(name for name, own in self._named.items() if own != 0)
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

    def _coefficients(self, labels: Labels) -> dict[str, float | None]:
        """By target, its coefficient, None where it is that of the training loss.

        Raises:
            UserError: a target that is named is not there.
        """
        named = self._named
        if named is None:
            learned = dict.fromkeys((*TARGETS, *(name for name, _ in labels.losses)))
            own = {name: getattr(self.options, name, None) for name in TARGETS}
            return {
                name: own.get(name)
                for name in learned
                if own.get(name) is not None or labels.taught is None or name in labels.taught
            }
        for name in named:
            if name not in labels.outputs:
                raise UserError(
                    f"{self.where}.targets has '{name}', which is none of outputs"
                    f"{did_you_mean(name, labels.outputs)}."
                )
        return named

    def _check_taught(self, name: str, labels: Labels) -> None:
        """Refuse a target that the teacher does not have, or has of something else.

        Raises:
            UserError: it is one.
        """
        key = f"{self.where}.{name}" if self._named is None else f"{self.where}.targets.{name}"
        taught = labels.taught
        if taught is None:
            return
        if name not in taught:
            raise UserError(
                f"{key}: the teacher does not predict '{name}' (it predicts "
                f"{', '.join(taught) or 'nothing'}): remove the key, or take a teacher that does."
            )
        level = labels.outputs[name].get("level", "system")
        if taught[name] != level:
            raise UserError(
                f"{key}: {name} is of the level {level} in outputs, and the teacher's is of the "
                f"level {taught[name]}: they are not the same, so leave it out."
            )

    def _compare(self, labels: Labels) -> list[_Compared]:
        """What is compared, and how, in a training with these labels."""
        compared: list[_Compared] = []
        for target, own in self._coefficients(labels).items():
            infos = [info for name, info in labels.losses if name == target]
            if not infos and (own or (self._named is not None and own is None)):
                key = target if self._named is None else f"targets.{target}"
                given = "there" if own is None else f"{own:g}"
                raise UserError(
                    f"{self.where}.{key} is {given}, but loss_functions has no {target} loss "
                    "whose function could be used; add one (with coefficient: 0 where its labels "
                    "are not to be learned) or remove the key."
                )
            whole = sum(float(info["coefficient"]) for info in infos)
            for number, info in enumerate(infos):
                weight = float(info["coefficient"])
                if own is not None:
                    weight = own * (weight / whole if whole > 0 else 1 / len(infos))
                if weight == 0:
                    continue
                if target not in labels.outputs:
                    raise UserError(
                        f"{self.where}: loss_functions compares '{target}', which is not under "
                        "outputs: add it there, or remove the loss."
                    )
                self._check_taught(target, labels)
                # only atoms have a mask; what a system has belongs to all its atoms
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
                f"{self.where}: vanilla has neither energy nor forces nor another target to "
                "compare; give one that the teacher predicts a loss in loss_functions, with a "
                "coefficient above 0 there or here."
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
        values = inputs.weighed(values, compared.target, per_atom=compared.per_atom)
        rows = inputs.atoms(free=compared.free_atoms) if compared.per_atom else inputs.systems
        total, count = masked_sum(values, rows)
        return Part(compared.name, compared.weight, total, count if compared.mean else None)


@dataclass
class PerAtomEnergyOptions(ElementwiseOptions):
    """Options of per_atom_energy."""

    fn: str = option("mae", choices=FUNCTIONS, help="how two energies are compared")
    target: str | None = option(
        None, help="the output that is a sum over atoms; default: energy, or the only one there is"
    )


@register_loss("per_atom_energy")
class PerAtomEnergy(Loss):
    """The mean over atoms of ``fn(e_s,i, e_t,i)``, the energies before the sum over a system.

    Any output that a model makes as a sum over atoms has such shares, in its own units.
    """

    Options = PerAtomEnergyOptions

    def __init__(self, options: LossOptions, where: str) -> None:
        super().__init__(options, where)
        self._target: str = self.options.target or "energy"

    @property
    def needs_atom_energy(self) -> bool:
        return True

    def compared_atom_energies(self, labels: Labels) -> tuple[str, ...]:
        target = self.options.target
        if target is None and labels.energy is None:
            raise UserError(
                f"{self.where}: which output it is about is not clear, since student and teacher "
                "do not have one energy of atoms by the same name; name the output in "
                f"{self.where}.target (outputs has {', '.join(labels.outputs)})."
            )
        target = target or labels.energy
        assert target is not None
        if target not in labels.outputs:
            raise UserError(
                f"{self.where}.target: {target} is none of outputs"
                f"{did_you_mean(target, labels.outputs)}."
            )
        if labels.outputs[target].get("level") == "atom":
            raise UserError(
                f"{self.where}.target: {target} is an output of atoms, which vanilla compares; "
                "name one of structures."
            )
        return (target,)

    def build(
        self,
        student_specs: Mapping[Request, FeatureSpec],
        teacher_specs: Mapping[Request, FeatureSpec],
        generator: torch.Generator,
        labels: Labels | None = None,
    ) -> None:
        if labels is not None:
            (self._target,) = self.compared_atom_energies(labels)

    def forward(self, inputs: LossInputs) -> list[Part]:
        student = inputs.student_atom_energies.get(self._target)
        teacher = inputs.teacher_atom_energies.get(self._target)
        if student is None or teacher is None:
            raise ValueError(f"per_atom_energy needs the {self._target} per atom of both models")
        values = elementwise(self.options.fn, student, teacher.detach(), self.options.delta)
        values = inputs.weighed(values, self._target, per_atom=True)
        return [Part("", 1.0, *masked_sum(values, inputs.atoms()))]
