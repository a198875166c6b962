"""How well a teacher does on the student's own labels, looked at before the first step.

A teacher that was trained with another zero of energy (other references, another code) teaches a
student numbers that contradict its labels, and no loss shows why. The error on a few labelled
structures does, and so does what is left of it when each element may have an energy of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairchem_kd.distillation.ratios import ratio_of, tell_ratios
from fairchem_kd.errors import UserError
from fairchem_kd.features import Request
from fairchem_kd.teachers import Taught, Teacher
from fairchem_kd.text import digits

if TYPE_CHECKING:
    from torch_geometric.data import Batch


Shift = Callable[[Taught, "Batch"], Taught]

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
    offset: float | None = None  #: mean of teacher - label in eV
    #: of other outputs, in their own units, by name
    others: Mapping[str, float] = field(default_factory=dict)
    #: teacher over label, of energy (beside energies of the elements) and forces, where unusual
    ratios: Mapping[str, float] = field(default_factory=dict)
    atoms: float = 0.0  #: of a structure, on average

    @property
    def other_zero(self) -> bool:
        """Whether only another zero of energy explains the error."""
        return _is_zero(self.energy, self.without_zero)

    @property
    def zeros(self) -> str:
        """By how much the zeros differ, in words."""
        return (
            f"they differ by {self.energy:.3g} eV on average, and by {self.without_zero:.2g} eV if "
            "each element may have an energy of its own"
        )

    def __str__(self) -> str:
        words = []
        if self.energy is not None:
            words.append(f"energy {digits(1e3 * self.energy)} meV")
        if self.forces is not None:
            words.append(f"forces {digits(1e3 * self.forces)} meV/Å")
        words = [" and ".join(words)] if words else []
        words += [f"{name} {digits(value)}" for name, value in self.others.items()]
        told = f"{', '.join(words)} (MAE of {self.structures} structures)"
        if self.offset is None:
            return told
        return f"{told}, its energies {digits(1e3 * self.offset, '+')} meV off on average"


def agreement(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
    shifted: Shift | None = None,
) -> Agreement | None:
    """The teacher's errors on evenly spread samples; None where nothing can be compared.

    Args:
        teacher: whose outputs are compared.
        requests: the features that are asked for with them, which a store has too.
        dataset: with labels.
        collate: makes a batch of samples.
        device: where the teacher is.
        shifted: what its answers are changed by before they are compared.
    """
    chosen = evenly(len(dataset), SAMPLES)
    errors, labels, counts = _errors(teacher, requests, dataset, chosen, collate, device, shifted)
    if not errors:
        return None
    sizes = {name: _mean(np.abs(values)) for name, values in errors.items()}
    energy = errors["energy"].ravel() if "energy" in errors else None
    return Agreement(
        len(chosen),
        sizes.pop("energy", None),
        sizes.pop("forces", None),
        None if energy is None else _without_zero(energy, counts),
        None if energy is None else _mean(energy),
        {name: value for name, value in sizes.items() if value is not None},
        _ratios(errors, labels, counts),
        float(counts.sum(1).mean()),
    )


def _ratios(
    errors: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], counts: np.ndarray
) -> dict[str, float]:
    """`ratio_of` of forces, and of what compositions leave of energies, where it is unusual."""
    found = {}
    if "forces" in errors:
        label = labels["forces"].ravel()
        found["forces"] = ratio_of(errors["forces"].ravel() + label, label)
    if "energy" in errors:
        error, label = errors["energy"].ravel(), labels["energy"].ravel()
        kept = np.isfinite(error) & np.isfinite(label)
        if enough(counts[kept]):
            theirs, ours = (
                fitted(values[kept], counts[kept])[1] for values in (error + label, label)
            )
            found["energy"] = ratio_of(theirs, ours)
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def energy_errors(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    chosen: Sequence[int],
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher - label in eV of chosen samples, ``(S,)``, and their compositions ``(S, 120)``.

    Both are empty where there is nothing to compare.
    """
    errors, _, counts = _errors(teacher, requests, dataset, chosen, collate, device, None)
    energy = errors.get("energy")
    return (np.zeros(0), counts[:0]) if energy is None else (energy.ravel(), counts)


def _errors(
    teacher: Teacher,
    requests: Sequence[Request],
    dataset: Any,
    chosen: Sequence[int],
    collate: Callable[[list[Any]], Batch],
    device: torch.device,
    shifted: Shift | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Teacher - label and label by output, ``(rows, C)``, and compositions ``(S, 120)``."""
    errors: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[np.ndarray]] = {}
    counts = []
    for start in range(0, len(chosen), _BATCH):
        samples = [dataset[i] for i in chosen[start : start + _BATCH]]
        counts += [composition(sample) for sample in samples]
        batch = collate(samples).to(device)
        said = teacher.teach(batch, requests)
        said = said if shifted is None else shifted(said, batch)  # NaN stays, and is left out
        for name, theirs in said.outputs.items():
            label = batch.get(name)
            if isinstance(label, torch.Tensor) and label.numel() == theirs.numel():
                own = label.to(theirs).view_as(theirs).double()
                errors.setdefault(name, []).append((theirs.double() - own).cpu().numpy())
                labels.setdefault(name, []).append(own.cpu().numpy())
    first, second = (
        {name: np.concatenate(parts) for name, parts in one.items()} for one in (errors, labels)
    )
    return first, second, np.stack(counts)


def evenly(size: int, number: int) -> list[int]:
    """At most so many indices, evenly spread over ``size``."""
    number = min(number, size)
    return [i * size // number for i in range(number)]


def composition(sample: Any) -> np.ndarray:
    """How many atoms of each element, ``(120,)``."""
    return np.bincount(np.asarray(sample.atomic_numbers).astype(int), minlength=120)


def enough(counts: np.ndarray) -> bool:
    """Whether so many compositions ``(S, 120)`` tell the energies of their elements.

    So many elements could explain anything otherwise.
    """
    return len(counts) >= 3 * (counts.any(axis=0).sum() + 1)


def fitted(energies: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The energies of the elements by least squares, ``(120,)``, and what is left, ``(S,)``.

    Args:
        energies: eV, ``(S,)``.
        counts: compositions, ``(S, 120)``.
    """
    held = counts.any(axis=0)
    shifts = np.zeros(counts.shape[1])
    shifts[held] = np.linalg.lstsq(counts[:, held].astype(float), energies, rcond=None)[0]
    return shifts, energies - counts @ shifts


def tell_agreement(
    found: Agreement | None, compares_energies: bool, compared: Collection[str] = ()
) -> None:
    """Say how well the teacher does, and refuse one with another zero of energy or other units.

    Args:
        found: as of :func:`agreement`.
        compares_energies: whether a loss compares the teacher's energies with the student's.
        compared: the outputs that losses compare.

    Raises:
        UserError: energies are compared whose zeros differ, or outputs whose units do.
    """
    if found is None:
        return
    logging.info(f"The teacher on the student's own labels: {found}")
    tell_ratios(found.ratios, found.atoms, {*compared, *(["energy"] if compares_energies else [])})
    if not found.other_zero:
        return
    told = f"The teacher's energies and the student's labels have different zeros: {found.zeros}."
    if compares_energies:
        raise UserError(
            f"{told} Set task.distillation.teacher.energy_zero: labels, which shifts the teacher's "
            "energies to the labels' zero, or write the labels with the teacher's references "
            "(`fairchem-kd data convert --references`), or leave energies out: vanilla.energy: 0, "
            "and no per_atom_energy."
        )
    logging.warning(f"{told} No loss compares energies here, so that this does no harm.")


def difference_in_zeros(errors: np.ndarray, compositions: np.ndarray) -> float | None:
    """The mean size of differences of energies, eV, where only another zero explains them.

    Args:
        errors: eV, ``(S,)``.
        compositions: how many atoms of each element, ``(S, 120)``.
    """
    size = _mean(np.abs(errors))
    return size if _is_zero(size, _without_zero(errors, compositions)) else None


def _is_zero(size: float | None, without: float | None) -> bool:
    """Whether so large an error, eV, is explained by what is left without zeros."""
    if size is None or without is None:
        return False
    return size > _LARGE and without < _SHARE * size


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
    if not enough(compositions[kept]):
        return None
    _, left = fitted(errors[kept], compositions[kept])
    return float(np.abs(left).mean())
