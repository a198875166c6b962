"""``StudentCalculator``: a student for ASE, with little around its own forward.

Its numbers are those of stock's ``OCPCalculator`` to the rounding of float32. What is left out is
done there at every step and says the same at every step: structures are made into samples and
batches anew, neighbours are searched among all pairs, and a trainer stands between.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import backbone_of, needs_autograd, refuse_wrong_forces
from fairchem_kd.md.exploded import ANSWER, POSITIONS, Exploded
from fairchem_kd.md.skin import SKIN, checked_skin
from fairchem_kd.md.systems import Systems
from fairchem_kd.models.build import build_model, check_finite, read_units
from fairchem_kd.models.elements import as_atomic_numbers, known_elements
from fairchem_kd.models.export import data_card
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.frozen import Teacher as FrozenModel
from fairchem_kd.models.legacy import modern_config
from fairchem_kd.models.units import Units
from fairchem_kd.random_state import isolated_random_state
from fairchem_kd.stock.gradient_forces import has_gradient_forces, strained
from fairchem_kd.stock.periodicity import axes
from fairchem_kd.stock.reused_graphs import ReusedGraphs

if TYPE_CHECKING:
    from ase import Atoms

Array = NDArray[np.float64]

_OF_A_RUN = ("best_checkpoint.pt", "checkpoint.pt")


class StudentCalculator(Calculator):
    """A stock checkpoint as an ASE calculator; several structures may be asked about at once.

    A model that was trained with ``task.conservative`` gives forces that are the slope of its
    energy, and of structures that are periodic along all axes the stress too. Not to be shared by
    threads.

    Args:
        path: a checkpoint of fairchem 1.x, exported or of a run, or the folder of a run.
        skin: Å by which neighbours are looked for beyond the cutoff: searched anew once an atom has
            moved by half of it.
        device: ``cpu`` or ``cuda``; where there is CUDA by default.
        trust: unpickle a file that may run code.

    Raises:
        UserError: no such checkpoint, or options that cannot be used.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  (ASE's)

    def __init__(
        self,
        path: str | Path,
        *,
        skin: float = SKIN,
        device: str | torch.device | None = None,
        trust: bool = False,
    ) -> None:
        super().__init__()
        self.skin = checked_skin(skin)
        self.device = _device(device)
        self.path, self.trust = Path(path).absolute(), trust
        self.model = _load(Path(path), self.device, trust)
        if "energy" not in self.model.outputs:
            raise UserError(f"{path} predicts no energies, so it is no calculator.")
        refuse_wrong_forces(self.model.model, f"The model in {path}")
        self.graphs = ReusedGraphs(backbone_of(self.model.model), self.skin)
        known = ["energy", "free_energy"]
        if "forces" in self.model.outputs:
            known.append("forces")
            if has_gradient_forces(self.model.model) and self.graphs.works:
                known.append("stress")
        self.implemented_properties = known
        self._stress = False  # whether it is asked for, as LAMMPS does at every step
        self._mode = torch.no_grad if needs_autograd(self.model.model) else torch.inference_mode
        self._systems: Systems | None = None
        self._last: Atoms | None = None  # of which `results` are
        self._zero: Any = None  # energies (eV) of the structures at a normalised energy of 0
        self._units: dict[str, tuple[float, float]] = {}
        self.use_cache = False  # ASE's, which copies structures at every step
        self.searches = 0  #: how often neighbours have been searched

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle and copy ask; some of stock's models cannot be: the file is read again."""
        device = str(self.device)
        made = functools.partial(type(self), skin=self.skin, device=device, trust=self.trust)
        return made, (self.path,)

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What is not as it was when `results` were worked out; as ASE asks, and sooner."""
        last, systems = self._last, self._systems
        if last is None or systems is None:
            return list(all_changes)
        if not np.array_equal(last.positions, atoms.positions):
            return ["positions"]  # and what else there may be: `_prepared` looks
        return [] if systems.are([atoms]) else list(all_changes)

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """As ASE asks.

        Raises:
            PropertyNotImplementedError: with the reason, for a stress that there is not.
        """
        if name == "stress":
            self._refuse_stress([] if atoms is None else [atoms])
            self._stress |= allow_calculation  # a trajectory takes what is there, and asks no more
        return super().get_property(name, atoms, allow_calculation)

    def _refuse_stress(self, structures: Sequence[Atoms]) -> None:
        """Refuse to give a stress where there is none.

        Raises:
            PropertyNotImplementedError: of this model, or of one of the structures.
        """
        if "stress" not in self.implemented_properties:
            raise PropertyNotImplementedError(
                f"{self.model.name} has no stress, which is the slope of an energy whose forces "
                "are its slope too, in a model that is periodic: take one that was trained with "
                "task.conservative and use_pbc: true."
            )
        for atoms in structures:
            if not _periodic(atoms):
                raise PropertyNotImplementedError(
                    "A stress is of structures that are periodic along all axes, and have an edge "
                    f"there, and {atoms.get_chemical_formula()} is not: ask for energy and forces "
                    "alone."
                )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """As ASE calls it.

        Raises:
            Exploded: the model has no finite answer for ``atoms``.
            UserError: an element that the model does not know.
        """
        atoms = self._last if atoms is None else atoms
        if atoms is None:
            raise UserError("There is no structure to compute: give one.")
        before, last, self._last = self._systems, self._last, None
        (self.results,) = self._answer([atoms], stress=self._stress and _periodic(atoms))
        if last is not None and self._systems is before:
            last.positions[:] = atoms.positions
        else:
            last = atoms.copy()
        self.atoms = self._last = last

    def calculate_batch(
        self, structures: Sequence[Atoms], *, stress: bool = False
    ) -> list[dict[str, Any]]:
        """Energies and forces of several structures, by one forward.

        Asked about the same structures again, moved a little, it searches no neighbours.

        Args:
            structures: of any size and periodicity.
            stress: give that too, which takes a little longer.

        Returns:
            For each its ``energy`` (eV), ``free_energy`` (the same) and ``forces`` (eV/Å,
            ``(N, 3)``, of fixed atoms too); ``stress``, eV/Å³, ``(6,)`` in Voigt's order.

        Raises:
            Exploded, UserError: as :meth:`calculate`.
            PropertyNotImplementedError: there is no stress.
        """
        if stress:
            self._refuse_stress(structures)
        self.reset()
        self._last = None
        return self._answer(list(structures), stress=stress) if len(structures) else []

    def _answer(self, structures: list[Atoms], *, stress: bool) -> list[dict[str, Any]]:
        slopes: list[torch.Tensor] = []
        with strained(self.model.model) if stress else nullcontext(slopes) as slopes:
            energies, forces = self._predict(structures)
        found: list[dict[str, Any]] = [{"energy": e, "free_energy": e} for e in energies]
        start = 0
        for atoms, one in zip(structures, found, strict=True):
            stop = start + len(atoms)
            if forces is not None:
                one["forces"] = forces[start:stop]
            start = stop
        if stress:
            scale, _ = self._unit("energy")
            for atoms, one, slope in zip(structures, found, slopes[0], strict=True):
                whole = scale * slope.double().cpu().numpy() / atoms.get_volume()
                one["stress"] = full_3x3_to_voigt_6_stress(whole)
        return found

    def _predict(self, structures: list[Atoms]) -> tuple[list[float], Array | None]:
        systems = self._prepared(structures)
        try:
            with self._mode():
                raw = self.model.forward(systems.batch).raw
            scale, _ = self._unit("energy")
            energy = scale * raw["energy"].reshape(-1).double().cpu().numpy() + self._zero
            forces = None
            if "forces" in raw:
                scale, shift = self._unit("forces")
                forces = scale * raw["forces"].double().cpu().numpy() + shift
        except UserError as error:
            self._systems = None
            raise Exploded(str(error)) from error
        if not (np.isfinite(energy).all() and (forces is None or np.isfinite(forces).all())):
            self._systems = None
            raise Exploded(ANSWER.format(formula=_which(structures, energy)))
        return energy.tolist(), forces

    def _unit(self, name: str) -> tuple[float, float]:
        """By what an output is multiplied and shifted on the way to eV or eV/Å."""
        if name not in self._units:
            normalizer = self.model.units.normalizers.get(name)
            unit = (1.0, 0.0)
            if normalizer is not None:
                unit = (float(normalizer.rmsd), float(normalizer.mean))
            self._units[name] = unit
        return self._units[name]

    def _prepared(self, structures: list[Atoms]) -> Systems:
        """The structures as the model takes them; what is known of their neighbours is kept."""
        systems = self._systems
        same = systems is not None and systems.are(structures)
        if systems is not None and same:
            farthest = systems.move_to(structures)
            if farthest < 0.4999 * self.skin:  # which NaN is not
                return systems
        for atoms in structures:
            if not len(atoms):
                raise UserError("There is a structure without atoms: leave it out.")
            if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell).all()):
                raise Exploded(POSITIONS.format(formula=atoms.get_chemical_formula()))
        if not same:
            numbers = np.concatenate([atoms.numbers for atoms in structures])
            self.model.check_elements(torch.from_numpy(numbers))
        try:
            systems = self._systems = Systems(structures, self.device)
        except ValueError as error:
            self._systems = None
            raise UserError(
                f"A structure cannot be computed with: {error}; mend its cell."
            ) from error
        zeros = torch.zeros(len(structures), 1, dtype=torch.float64, device=self.device)
        self._zero = (
            self.model.units.physical("energy", zeros, systems.batch).reshape(-1).cpu().numpy()
        )
        self.graphs.renew()
        self.searches += 1
        return systems


def _periodic(atoms: Atoms) -> bool:
    """Whether it is periodic along all axes; along one without an edge nothing is."""
    return bool(axes(atoms.pbc, np.array(atoms.cell)).all())


def _device(given: str | torch.device | None) -> torch.device:
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise UserError(f"device is {given!r}, and may be cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and there is none here: leave it out.")
    return device


def _load(path: Path, device: torch.device, trust: bool) -> FrozenModel:
    """The model of a checkpoint, frozen, with its units."""
    if path.is_dir():
        found = [path / name for name in _OF_A_RUN if (path / name).is_file()]
        if not found:
            raise UserError(
                f"The folder {path} has neither {' nor '.join(_OF_A_RUN)}: name a checkpoint."
            )
        path = found[0]
    contents = read_checkpoint(path, trust=trust, hint="give trust=True if you trust it")
    with isolated_random_state():
        model = build_model(contents, str(path)).to(device)
    check_finite(model, str(path))
    elements = known_elements(path, None) or _elements_of_data(contents["config"])
    if elements is None:
        _tell_of_elements()
    return FrozenModel(
        model,
        Units(*read_units(contents, device)),
        modern_config(contents["config"])["outputs"],
        elements=elements,
        name=str(path),
    )


def _elements_of_data(config: Mapping[str, Any]) -> frozenset[int] | None:
    """Those of a run's training data, by the card that lies there; None where it has none now."""
    with suppress(UserError):
        named = (data_card(None, config) or {}).get("elements")
        return None if named is None else frozenset(as_atomic_numbers(named, "the data's card"))
    return None


@functools.cache  # once a process, though there may be many models
def _tell_of_elements() -> None:
    logging.warning(
        "No card, of the checkpoint or of its data, says which elements the model was trained on, "
        "so that it answers about others too, without sense: `fairchem-kd export` writes a card."
    )


def _which(structures: Sequence[Atoms], energies: Array) -> str:
    """The first structure without a finite energy, or the only one, in words."""
    bad = np.flatnonzero(~np.isfinite(energies))
    number = int(bad[0]) if len(bad) else 0
    formula = structures[number].get_chemical_formula()
    return formula if len(structures) == 1 else f"structure {number} ({formula})"
