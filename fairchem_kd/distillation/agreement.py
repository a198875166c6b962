"""How well a teacher does on the student's own labels, looked at before the first step.

A teacher that was trained with another zero of energy (other references, another code) teaches a
student numbers that contradict its labels, and no loss shows why. The error on a few labelled
structures does, and so does what is left of it when each element may have an energy of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
from fairchem_kd.teachers import Teacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

SAMPLES = 64
_BATCH = 16
#: A difference of zeros is one that leaves this share of the error when it is taken out, and whose
#: error is larger than this, in eV.
_SHARE, _LARGE = 0.1, 0.5


@dataclass(frozen=True)
class Agreement:
    """A teacher's errors on labelled structures."""

    structures: int
    energy: float | None  #: MAE in eV
    forces: float | None  #: MAE in eV/Å
    #: MAE in eV where each element has a best energy of its own; None where too few tell
    without_zero: float | None

    @property
    def other_zero(self) -> bool:
        """Whether only another zero of energy explains the error."""
        if self.energy is None or self.without_zero is None:
            return False
        return self.energy > _LARGE and self.without_zero < _SHARE * self.energy

    def __str__(self) -> str:
        words = []
        if self.energy is not None:
            words.append(f"energy {1e3 * self.energy:.3g} meV")
        if self.forces is not None:
            words.append(f"forces {1e3 * self.forces:.3g} meV/Å")
        return f"{' and '.join(words)} (MAE of {self.structures} structures)"


def agreement(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
) -> Agreement | None:
    """The teacher's errors on evenly spread samples; None where nothing can be compared.

    Args:
        teacher: whose outputs are compared.
        requests: the features that are asked for with them, which a store has too.
        dataset: with labels.
        collate: makes a batch of samples.
        device: where the teacher is.
    """
    count = len(dataset)
    number = min(SAMPLES, count)
    chosen = [i * count // number for i in range(number)]
    energies: list[np.ndarray] = []
    forces: list[np.ndarray] = []
    compositions: list[np.ndarray] = []
    for start in range(0, number, _BATCH):
        batch = collate([dataset[i] for i in chosen[start : start + _BATCH]])
        numbers = batch.atomic_numbers.long()
        counts = torch.zeros(len(batch.natoms), 120).index_put(
            (batch.batch, numbers), torch.ones(len(numbers)), accumulate=True
        )
        said = teacher.teach(batch.to(device), requests).sound(())
        for name, errors in (("energy", energies), ("forces", forces)):
            label = batch.get(name)
            if name in said.outputs and isinstance(label, torch.Tensor):
                theirs = said.outputs[name].double()
                errors.append((theirs - label.to(theirs).view_as(theirs)).cpu().numpy())
        compositions.append(counts.numpy())
    if not energies and not forces:
        return None
    energy = np.concatenate(energies).ravel() if energies else None
    return Agreement(
        number,
        None if energy is None else _mean(np.abs(energy)),
        _mean(np.abs(np.concatenate(forces))) if forces else None,
        None if energy is None else _without_zero(energy, np.concatenate(compositions)),
    )


def tell_agreement(found: Agreement | None, compares_energies: bool) -> None:
    """Say how well the teacher does, and refuse one with another zero of energy.

    Args:
        found: as of :func:`agreement`.
        compares_energies: whether a loss compares the teacher's energies with the student's.

    Raises:
        UserError: energies are compared whose zeros differ.
    """
    if found is None:
        return
    logging.info(f"The teacher on the student's own labels: {found}")
    if not found.other_zero:
        return
    told = (
        f"The teacher's energies and the student's labels have different zeros: they differ by "
        f"{found.energy:.3g} eV on average, and by {found.without_zero:.2g} eV if each element may "
        "have an energy of its own."
    )
    if compares_energies:
        raise UserError(
            f"{told} Write the labels with the teacher's references (`fairchem-kd data convert "
            "--references`), or leave energies out: vanilla.energy: 0, and no per_atom_energy."
        )
    logging.warning(f"{told} No loss compares energies here, so that this does no harm.")


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def _without_zero(errors: np.ndarray, compositions: np.ndarray) -> float | None:
    """What is left of energy errors ``(S,)`` beside energies of the elements.

    Args:
        errors: eV.
        compositions: how many atoms of each element, ``(S, 120)``.
    """
    kept = np.isfinite(errors)
    used = compositions[kept][:, compositions[kept].any(axis=0)]
    if len(used) < 3 * (used.shape[1] + 1):
        return None  # so many elements could explain anything
    fitted, *_ = np.linalg.lstsq(used, errors[kept], rcond=None)
    return float(np.abs(errors[kept] - used @ fitted).mean())
