"""What our own tests check of an architecture and of a loss, for the tests of others.

::

    def test_my_features():
        check_architecture(my_model, samples)

    def test_my_loss():
        check_loss(MyLoss.from_options({}, "my_loss"))

Each raises an `AssertionError` that says what does not hold and of what.
"""

from __future__ import annotations

from fairchem_kd.testing.architectures import (
    MOVES,
    check_architecture,
    check_edges,
    check_symmetry,
    moved,
)
from fairchem_kd.testing.losses import check_loss

__all__ = ["MOVES", "check_architecture", "check_edges", "check_loss", "check_symmetry", "moved"]
