"""Several structures, one of which a calculator has no answer for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.constraints import Hookean

from fairchem_kd.md.several import ask_several


class OneByOne(Calculator):
    """The energy is the number of atoms; three are too many."""

    implemented_properties = ("energy", "forces")
    asked = 0

    def calculate(
        self, atoms: Any = None, properties: Any = (), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.asked += 1
        if len(atoms) == 3:
            raise CalculationFailed("three are too many")
        self.results = {"energy": float(len(atoms)), "forces": np.zeros((len(atoms), 3))}


class AtOnce(OneByOne):
    batches = 0

    def calculate_batch(self, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
        self.batches += 1
        found = []
        for atoms in structures:
            self.calculate(atoms)
            found.append(dict(self.results))
        return found


def of_sizes(*sizes: int) -> list[Atoms]:
    return [Atoms(f"H{n}", positions=np.arange(3.0 * n).reshape(n, 3)) for n in sizes]


@pytest.mark.parametrize("kind", [OneByOne, AtOnce])
@pytest.mark.parametrize("sizes", [(), (1,), (3,), (1, 2, 1, 2), (3, 1, 2, 3, 2), (3, 3)])
def test_each_has_its_answer_or_why_not(kind: type[OneByOne], sizes: tuple[int, ...]) -> None:
    found = ask_several(kind(), of_sizes(*sizes))
    assert len(found) == len(sizes)
    for size, one in zip(sizes, found, strict=True):
        if size == 3:
            assert isinstance(one, CalculationFailed)
            assert str(one) == "three are too many"
        else:
            assert isinstance(one, dict)
            assert (one["energy"], one["forces"].shape) == (size, (size, 3))


def test_the_one_that_fails_is_found_by_halves() -> None:
    calculator = AtOnce()
    ask_several(calculator, of_sizes(*[1] * 16))
    assert calculator.batches == 1
    ask_several(calculator, of_sizes(*[1] * 10, 3, *[1] * 5))
    assert calculator.batches == 1 + 9


def test_what_else_goes_wrong_is_not_held_back() -> None:
    class Wrong(AtOnce):
        def calculate_batch(self, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        ask_several(Wrong(), of_sizes(1, 2))


@pytest.mark.parametrize("kind", [OneByOne, AtOnce])
def test_constraints_have_no_say(kind: type[OneByOne]) -> None:
    """Some have an energy of their own, which whoever integrates adds."""
    (atoms,) = of_sizes(2)
    atoms.set_constraint(Hookean(0, 1, k=5.0, rt=1.0))
    (found,) = ask_several(kind(), [atoms])
    assert isinstance(found, dict)
    assert found["energy"] == 2.0
    assert not found["forces"].any()
    assert len(atoms.constraints) == 1
