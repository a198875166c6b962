"""A student for torch-sim, which moves many structures at once.

Needs ``torch-sim-atomistic`` (0.3 or later), which is not installed with this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from fairchem_kd.errors import UserError
from fairchem_kd.md.calculator import SKIN, StudentCalculator

try:
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ImportError as error:
    raise UserError(
        f"torch-sim cannot be imported ({error}): pip install torch-sim-atomistic."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor


class StudentModel(ModelInterface):
    """A checkpoint as torch-sim has models: energies and forces of a batch, by one forward.

    It computes as :class:`StudentCalculator` does, in float32 whatever ``dtype`` the states have,
    and searches neighbours as seldom. Cells can be relaxed by a model with ``compute_stress``,
    which one that was trained with ``task.conservative`` has.

    Args:
        path, skin, device, trust: as :class:`StudentCalculator` takes them.
        compute_stress: give the stress too; may be set later.
        dtype: of the states and of what is returned; float64 keeps what integrators sum up.

    Raises:
        UserError: as :class:`StudentCalculator`; or the model predicts no forces, or no stress
            where that is asked for.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        skin: float = SKIN,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        trust: bool = False,
        compute_stress: bool = False,
    ) -> None:
        super().__init__()
        self._calculator = StudentCalculator(path, skin=skin, device=device, trust=trust)
        if "forces" not in self._calculator.implemented_properties:
            raise UserError(f"{path} predicts no forces, and torch-sim moves atoms by them.")
        self._device = self._calculator.device
        self._dtype = dtype
        self._compute_forces = True
        self._compute_stress = False
        self._structures: list[Atoms] = []
        if compute_stress:
            try:
                self.compute_stress = True
            except NotImplementedError as error:
                raise UserError(str(error)) from error

    @property
    def compute_stress(self) -> bool:
        """Whether the stress is given too."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, wanted: bool) -> None:
        if wanted and "stress" not in self._calculator.implemented_properties:
            raise NotImplementedError(  # torch-sim's word for it
                f"compute_stress is asked of {self._calculator.model.name}, which has no stress: "
                "take a student that was trained with task.conservative and use_pbc: true."
            )
        self._compute_stress = bool(wanted)

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """``energy`` ``(B,)`` in eV and ``forces`` ``(N, 3)`` in eV/Å of a state.

        With ``compute_stress`` its ``stress`` too, ``(B, 3, 3)`` in eV/Å³.

        Raises:
            Exploded: the model has no finite answer for one of the structures.
            PropertyNotImplementedError: a stress of one that is not periodic along all axes.
        """
        if isinstance(state, dict):
            state = SimState(masses=torch.ones_like(state["positions"][:, 0]), **state)
        found = self._calculator.calculate_batch(self._of(state), stress=self._compute_stress)
        energy = torch.tensor([one["energy"] for one in found])
        forces = torch.from_numpy(np.concatenate([one["forces"] for one in found]))
        said = {"energy": energy, "forces": forces}
        if self._compute_stress:
            whole = [voigt_6_to_full_3x3_stress(one["stress"]) for one in found]
            said["stress"] = torch.from_numpy(np.stack(whole))
        return {name: value.to(self._device, self._dtype) for name, value in said.items()}

    def _of(self, state: Any) -> list[Atoms]:
        """The state's structures; those of the last one, moved, where only positions changed."""
        positions = state.positions.detach().double().cpu().numpy()
        numbers = state.atomic_numbers.cpu().numpy()
        cells = state.row_vector_cell.detach().double().cpu().numpy()
        pbc = np.broadcast_to(np.asarray(torch.as_tensor(state.pbc).cpu(), bool), 3)
        sizes = torch.bincount(state.system_idx, minlength=len(cells)).tolist()
        stops = np.cumsum(sizes)
        known = self._structures if [len(one) for one in self._structures] == sizes else []
        found = []
        for system, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
            rows = slice(stop - size, stop)
            atoms = known[system] if known else Atoms(numbers=numbers[rows])
            atoms.numbers[:] = numbers[rows]
            atoms.positions[:] = positions[rows]
            atoms.cell[:] = cells[system]
            atoms.pbc = pbc
            found.append(atoms)
        self._structures = found
        return found
