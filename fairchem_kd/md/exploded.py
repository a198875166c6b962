"""What a calculator says of a structure that has left what its model knows."""

from __future__ import annotations

from ase.calculators.calculator import CalculationFailed

from fairchem_kd.errors import UserError


class Exploded(UserError, CalculationFailed):
    """A structure of which a model gives no finite answer, or no answer at all.

    What was written before it, a trajectory for example, is whole.
    """


POSITIONS = (
    "A position or the cell of {formula} is not finite, so that the dynamics have gone wrong: take "
    "a shorter time step, and look at the last structures that were written."
)
ANSWER = (
    "The model's answer for {formula} is not finite: its atoms have come where the model knows "
    "nothing; look at the last structures that were written and take a shorter time step, or a "
    "model trained on such structures."
)
