"""How the members of an ensemble compare on labelled structures, before their spread counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairchem_kd.distillation.agreement import Shift, difference_in_zeros
from fairchem_kd.errors import UserError
from fairchem_kd.teachers.ensemble import EnsembleTeacher, called

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.features import Request

_ALIKE = 0.95  # correlation of forces from which their ratio says something: of trained models
_LARGEST = 3.0  # ratio of forces of one structure that models may have


class Seen:
    """What an ensemble says of labelled structures, collected."""

    def __init__(self) -> None:
        self.compositions: list[np.ndarray] = []
        self.energies: list[np.ndarray] = []  # (M, B) each: of the members, as they are
        #: (M, M): of the members' forces, summed over the components of all atoms
        self.products: np.ndarray | None = None
        self._spreads: dict[str, list[np.ndarray]] = {}
        self._errors: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        teacher: EnsembleTeacher,
        requests: Sequence[Request],
        batch: Batch,
        names: Iterable[str],
        shifted: Shift | None,
    ) -> None:
        """Take in a batch."""
        answers = teacher.answers(batch, requests)
        said = teacher.combined(answers)
        said = said if shifted is None else shifted(said, batch)
        if "energy" in said.outputs:
            energies = torch.stack([one.outputs["energy"].view(-1) for one in answers])
            self.energies.append(energies.cpu().numpy())
        if "forces" in said.outputs:
            forces = torch.stack([one.outputs["forces"].reshape(-1).double() for one in answers])
            forces = forces[:, torch.isfinite(forces).all(0)]
            products = (forces @ forces.T).cpu().numpy()
            self.products = products if self.products is None else self.products + products
        for name in names:
            self._spreads.setdefault(name, []).append(said.spread[name].cpu().numpy())
            errors = _errors(said.outputs[name], batch.get(name), batch)
            self._errors.setdefault(name, []).append(errors.cpu().numpy())

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Spreads and errors of an output, ``(S,)`` each."""
        return np.concatenate(self._spreads[name]), np.concatenate(self._errors[name])


def _errors(theirs: Tensor, label: Any, batch: Batch) -> Tensor:
    """``(B,)``: the rms over each structure of an output minus its label; NaN without one."""
    systems = len(batch.natoms)
    if not isinstance(label, Tensor) or label.numel() != theirs.numel():
        return theirs.new_full((systems,), torch.nan)
    square = (theirs - label.to(theirs).view_as(theirs)).square().mean(1)
    if len(square) == systems:
        return square.sqrt()
    sums = square.new_zeros(systems).index_add(0, batch.batch, square)
    return (sums / batch.natoms).sqrt()


def check_zeros(teacher: EnsembleTeacher, seen: Seen) -> None:
    """Refuse members whose energies differ by an energy for each element.

    Raises:
        UserError: naming the member that is furthest from the mean.
    """
    energies = np.concatenate(seen.energies, axis=1)  # (M, S)
    found = [
        (size, number)
        for number, own in enumerate(energies - energies.mean(0))
        if (size := difference_in_zeros(own, np.stack(seen.compositions))) is not None
    ]
    if found:
        size, number = max(found)
        raise UserError(
            f"The energies of the ensemble's members have different zeros: those of "
            f"{called(teacher.given[number])} are {size:.3g} eV off the mean of all, most of it an "
            "energy for each element, so that their spread is not one of uncertainty: take members "
            "that were trained on labels with one zero."
        )


def check_forces(teacher: EnsembleTeacher, seen: Seen) -> None:
    """Refuse members whose forces are those of the others in another unit or with another sign.

    Raises:
        UserError: naming the member that differs so from the most others.
    """
    products = seen.products
    if products is None:
        return
    sizes = np.sqrt(np.diag(products))
    apart: dict[int, list[tuple[int, float]]] = {}  # of a member those that have other forces
    for one, other in combinations(range(len(products)), 2):
        both = sizes[one] * sizes[other]
        if both == 0 or abs(products[one, other]) < _ALIKE * both:
            continue
        if not 1 / _LARGEST <= products[one, other] / sizes[one] ** 2 <= _LARGEST:
            for number, than in ((one, other), (other, one)):
                ratio = float(products[one, other] / sizes[than] ** 2)
                apart.setdefault(number, []).append((than, ratio))
    if apart:
        number = max(apart, key=lambda one: (len(apart[one]), one))
        than, ratio = apart[number][0]
        raise UserError(
            f"The forces of the ensemble's member {called(teacher.given[number])} are {ratio:.3g} "
            f"times those of {called(teacher.given[than])}, so that one of them is in other units "
            "or has another sign: take members that give eV/Å, minus the gradient of the energy."
        )
