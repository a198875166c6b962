"""Whether labels are what a teacher says of them but for a factor: units, or a sign."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np

from fairchem_kd.errors import UserError

_ALIKE = 0.95  # correlation from which a factor says something
_USUAL = (1 / 3, 3.0)  # what teachers are off by that are only bad
_FEW = 8  # structures from which a factor can be told


def ratio_of(theirs: np.ndarray, labels: np.ndarray) -> float | None:
    """The slope of ``theirs`` against ``labels``, ``(n,)``; None: it is usual, or tells nothing.

    It is that through the origin: take differences whose zero means something.
    """
    kept = np.isfinite(theirs) & np.isfinite(labels)
    theirs, labels = theirs[kept], labels[kept]
    square, product = float(labels @ labels), float(labels @ theirs)
    both = np.sqrt(square * float(theirs @ theirs))
    if len(labels) < _FEW or not both or abs(product) < _ALIKE * both:
        return None
    ratio = product / square
    return None if _USUAL[0] <= ratio <= _USUAL[1] else ratio


def tell_ratios(ratios: Mapping[str, float], atoms: float, compared: Collection[str]) -> None:
    """Refuse labels in other units than the teacher's, where a loss compares the two; else warn.

    Args:
        ratios: of the teacher's outputs to the labels, by output (`ratio_of`).
        atoms: of a structure, on average.
        compared: outputs that losses compare.

    Raises:
        UserError: naming the output and the factor.
    """
    for name, ratio in ratios.items():
        guess = "in other units" if ratio > 0 else "of another sign"
        if name == "energy" and abs(np.log(abs(ratio) / max(atoms, 1.0))) < 0.15 and atoms > 3:
            guess = "energies per atom, and not of whole structures"
        told = (
            f"What the teacher says of {name} is {ratio:.3g} times the labels of dataset.train, so "
            f"that these or the teacher's are {guess}"
        )
        if name in compared:
            raise UserError(
                f"{told}: both have to be in eV and eV/Å, forces minus the gradient of the energy; "
                f"mend the data, or leave {name} out of the losses."
            )
        logging.warning(f"{told}. No loss compares {name}, so that this does no harm.")
