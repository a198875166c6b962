"""A teacher's energies moved to the zero of the student's labels, element by element.

Total energies, adsorption energies and energies of formation of the same structures differ by an
energy for each atom of an element. Where only that tells the teacher from the labels
(`agreement`), least squares finds it: label - teacher = sum over atoms of the shift of its element.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from fairchem_kd.distillation.agreement import composition, energy_errors, enough, evenly, fitted
from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
from fairchem_kd.teachers import Taught, Teacher
from fairchem_kd.training.ranks import rank, refused_by_all, same_on_ranks

if TYPE_CHECKING:
    from torch_geometric.data import Batch

KEY = "task.distillation.teacher.energy_zero"
SAMPLES = 512  #: labelled structures of which the teacher is asked
_LOOKED_AT = 4096  # structures among which elements are looked for that those do not have
_OF_EACH = 8  # structures that are added for such an element


class EnergyZero:
    """What is added to a teacher's energies for each atom.

    Args:
        shifts: eV by atomic number, ``(120,)``, float64; NaN for elements of which nothing is
            known.
    """

    def __init__(self, shifts: Tensor) -> None:
        self.shifts = shifts
        self._there = shifts  # on the device of the last batch

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse atoms of elements whose shift is not known.

        Raises:
            UserError: naming the elements.
        """
        numbers = atomic_numbers.long()
        unknown = self.shifts.to(numbers.device)[numbers].isnan()
        if bool(unknown.any()):
            names = sorted({chemical_symbols[z] for z in numbers[unknown].tolist()})
            raise UserError(
                f"The data holds {', '.join(names)}, which none of the labelled structures has "
                f"from which {KEY}: labels was fitted: add labelled structures with them, or take "
                "structures without."
            )

    def applied(self, said: Taught, batch: Batch) -> Taught:
        """An answer about a batch, with its energies and what atoms give to them shifted."""
        if self._there.device != batch.pos.device:
            self._there = self.shifts.to(batch.pos.device)
        each = self._there[batch.atomic_numbers.long()][:, None]
        outputs, shares = dict(said.outputs), dict(said.atom_energies)
        if "energy" in outputs:
            outputs["energy"] = outputs["energy"].index_add(0, batch.batch, each)
        if "energy" in shares:
            shares["energy"] = shares["energy"] + each
        return dataclasses.replace(said, outputs=outputs, atom_energies=shares)


def fit_zero(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
) -> EnergyZero:
    """The zero of the labels of a data set; the log says what it is.

    Args:
        teacher: whose energies are shifted.
        requests: the features that are asked for with them, which a store has too.
        dataset: with labels of energies.
        collate: makes a batch of samples.
        device: where the teacher is.

    Raises:
        UserError: there are no such labels, or too few.
    """
    chosen = _chosen(dataset)
    errors, counts = energy_errors(teacher, requests, dataset, chosen, collate, device)
    kept = np.isfinite(errors)
    errors, counts = errors[kept], counts[kept]
    if not len(errors):
        raise UserError(f"{KEY} is labels, but dataset.train has no energies: set it to teacher.")
    if not enough(counts):
        raise UserError(
            f"{KEY} is labels, but the energies of {len(errors)} labelled structures are too few "
            f"for the zeros of {counts.any(axis=0).sum()} elements: label more, or take a teacher "
            "with the labels' zero."
        )
    shifts, left = fitted(-errors, counts)
    known = counts.any(axis=0)
    words = ", ".join(f"{chemical_symbols[z]} {shifts[z]:+.4g}" for z in np.flatnonzero(known))
    logging.info(
        f"{KEY}: labels: the teacher's energies are shifted by {words} eV for each atom, fitted "
        f"to {len(errors)} labels: off by {np.abs(errors).mean():.3g} eV on average before, and by "
        f"{np.abs(left).mean():.2g} eV now"
    )
    apart = int(np.linalg.matrix_rank(counts[:, known]))
    if apart < known.sum():
        logging.warning(
            f"The labels do not tell the zeros of {known.sum()} elements apart ({apart} can be): "
            "the shift is right for structures composed as they are, and may not be for others."
        )
    shifts[~known] = np.nan
    return EnergyZero(torch.from_numpy(shifts))


def fit_zero_on_first(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
) -> EnergyZero:
    """`fit_zero` on the first rank, for all; a collective.

    Raises:
        UserError: on every rank, what `fit_zero` refuses.
    """
    shifts = torch.zeros(120, dtype=torch.float64)
    with refused_by_all():
        if rank() == 0:
            shifts = fit_zero(teacher, requests, dataset, collate, device).shifts
    return EnergyZero(same_on_ranks(shifts))


def _chosen(dataset: Any) -> list[int]:
    """Evenly spread samples, and some more where those lack an element that others have."""
    size = len(dataset)
    chosen = evenly(size, SAMPLES)
    if size <= SAMPLES:
        return chosen
    seen = np.zeros(120, dtype=int)
    for index in chosen:
        seen += composition(dataset[index]) > 0
    for index in sorted(set(evenly(size, _LOOKED_AT)) - set(chosen)):
        held = composition(dataset[index]) > 0
        if (seen[held] < _OF_EACH).any():
            seen += held
            chosen.append(index)
    return chosen
