"""What gives energies and forces while structures move: a checkpoint, or an ASE calculator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ase
import numpy as np
from numpy.typing import NDArray

from fairchem_kd.calculators.asking import Calculator, NoAnswer
from fairchem_kd.errors import UserError
from fairchem_kd.stock.periodicity import everywhere
from fairchem_kd.store.format import Structure
from fairchem_kd.store.names import ENERGY, FORCES, output_column

Array = NDArray[np.float64]
PROBED = 16  #: structures among which one is looked for that something can be said of


@dataclass(frozen=True)
class Answer:
    """What is said of one structure."""

    energy: float  #: eV
    forces: Array  #: eV/Å, (N, 3), of fixed atoms too
    #: of a calculator, all that a store keeps of it, by column
    kept: Mapping[str, Array] | None = None


class Potential(Protocol):
    """Whatever can be asked."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def batch(self) -> int:
        """How many structures it is best asked about at once."""

    def __call__(self, structures: Sequence[ase.Atoms]) -> list[Answer | None]:
        """What it says of each; None where nothing."""

    def check_elements(self, numbers: NDArray[np.int64]) -> None:
        """Refuse atoms that it knows nothing about, as far as it can tell.

        Raises:
            UserError: naming the elements.
        """


class ModelPotential:
    """A checkpoint of fairchem's, asked about many structures by one forward.

    Args:
        path: a checkpoint, or the folder of a run.
        cpu: use the CPU even where there is CUDA.
        trust: unpickle a file that may run code.

    Raises:
        UserError: it cannot be read, or gives no energies and forces.
    """

    batch = 16

    def __init__(self, path: Path, *, cpu: bool = False, trust: bool = False) -> None:
        from fairchem_kd.md import StudentCalculator

        self.name = str(path)
        self._calculator = StudentCalculator(path, device="cpu" if cpu else None, trust=trust)
        if "forces" not in self._calculator.implemented_properties:
            raise UserError(f"{path} predicts no forces, and nothing moves without: name another.")

    def __call__(self, structures: Sequence[ase.Atoms]) -> list[Answer | None]:
        from fairchem_kd.md.several import ask_several

        answers = ask_several(self._calculator, structures)
        return [_answer(one) if isinstance(one, dict) else None for one in answers]

    def check_elements(self, numbers: NDArray[np.int64]) -> None:
        import torch

        self._calculator.model.check_elements(torch.from_numpy(numbers))


class CalculatorPotential:
    """An ASE calculator, asked about one structure after the other.

    Args:
        calculator: that is asked.
    """

    batch = 1

    def __init__(self, calculator: Calculator) -> None:
        self.calculator = calculator
        self.name = calculator.factory.name

    def __call__(self, structures: Sequence[ase.Atoms]) -> list[Answer | None]:
        return [self._ask(atoms) for atoms in structures]

    def _ask(self, atoms: ase.Atoms) -> Answer | None:
        try:
            values = self.calculator.values(structure_of(atoms))
        except NoAnswer:
            return None
        energy, forces = values[output_column(ENERGY)], values[output_column(FORCES)]
        return Answer(float(energy[0]), forces, values)

    def check_elements(self, numbers: NDArray[np.int64]) -> None:
        """A calculator does not say which it knows; :func:`probe` and its failures tell."""


def told_of(path: Path) -> list[Any]:
    """What a checkpoint, or that of a run, is known by: where, how large, and when written.

    Raises:
        UserError: it does not exist, or the run has none.
    """
    from fairchem_kd.analysis.subjects.runs import find_checkpoint

    if not path.exists():
        raise UserError(f"{path} does not exist in {Path.cwd()}; name a checkpoint.")
    path = find_checkpoint(path)
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def structure_of(atoms: ase.Atoms) -> Structure:
    """As a store knows it: periodic along all axes, with room along those that were not."""
    return Structure(
        atoms.numbers,
        atoms.positions,
        everywhere(np.array(atoms.cell), atoms.pbc, atoms.positions),
        np.ones(3, dtype=bool),
        atoms.get_tags(),
    )


def probe(calculator: Calculator, structures: Sequence[ase.Atoms]) -> list[str]:
    """Look at a calculator before much is asked of it; what was found, in sentences.

    Raises:
        UserError: it can say nothing of any of the first structures, or its forces are not minus
            the gradient of its energy in eV/Å.
    """
    from fairchem_kd.calculators.checks import check_forces, check_repeats

    tried = [structure_of(atoms) for atoms in structures[:PROBED]]
    why: NoAnswer | None = None
    for structure in tried:
        try:
            calculator.values(structure)
            break
        except NoAnswer as error:
            why = error
    else:
        raise UserError(
            f"--calculator {calculator.factory.path} can say nothing of the first {len(tried)} "
            f"structures: {why}. Mend that, or take structures that it knows."
        )
    found = check_forces(calculator, tried)
    said = [] if found is None else [f"Looked at {found}."]
    return said + check_repeats(calculator, tried[0])


def _answer(found: dict[str, Any]) -> Answer:
    return Answer(float(found["energy"]), np.asarray(found["forces"], np.float64))
