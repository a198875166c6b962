"""A student's module file (``NAME.pt2``) as an ASE calculator: torch, numpy, scipy and ASE alone.

What is read here was written by ``fairchem-kd export --module``. The file holds the network behind
the graph and the rule of its graph; here neighbours are found, and energies, forces and stress made
of what the network says. Vectors along edges are taken in float64 before the network has them in
its own precision.
"""

from __future__ import annotations

import logging
import math
import warnings
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols
from ase.geometry import wrap_positions
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from fairchem_kd.errors import UserError
from fairchem_kd.json_file import MAX_JSON, Unreadable, parse_json
from fairchem_kd.md.exploded import ANSWER, POSITIONS, Exploded
from fairchem_kd.md.skin import SKIN, checked_skin
from fairchem_kd.models.module_file import ABOUT, FORMAT
from fairchem_kd.stock.pairs import SAME_ATOM, neighbours
from fairchem_kd.weights_only import weights_only

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class ModuleCalculator(Calculator):
    """A module file as an ASE calculator.

    Its numbers are those of the checkpoint to the rounding of float32. Where forces are the slope
    of the energy there is the stress too, of structures that are periodic along all axes. Loading
    a file runs what torch finds in it: take files that you trust.

    Args:
        path: ``NAME.pt2``.
        skin: Å by which neighbours are looked for beyond the cutoff: searched anew once an atom has
            moved by half of it.
        device: ``cpu``, or ``cuda``.
        dtype: in which the network computes: ``float32`` as it was trained, or ``float64``.

    Raises:
        UserError: no such file, another file, or one that this torch cannot load.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        path: str | Path,
        *,
        skin: float = SKIN,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.skin = checked_skin(skin)
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, and may be {' or '.join(DTYPES)}.")
        self.dtype = DTYPES[dtype]
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"device is {device!r}, and may be cpu or cuda.") from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, and there is none here: leave it out.")
        self.path = Path(path).absolute()
        self.about = read_about(Path(path))
        self.network = _load(Path(path), self.about["torch"]).to(self.device, self.dtype)
        forces = self.about["forces"]
        known = ["energy", "free_energy"]
        if forces is not None:
            known.append("forces")
            energy = self.about["energy"]
            if forces["from"] == "energy" and math.isclose(forces["scale"], energy["scale"]):
                known.append("stress")
        self.implemented_properties = known
        self.searches = 0  #: how often neighbours have been searched
        self._edges: _Edges | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle and copy ask; networks that torch loads cannot be: the file is read again."""
        dtype = next(name for name, one in DTYPES.items() if one == self.dtype)
        made = partial(type(self), skin=self.skin, device=str(self.device), dtype=dtype)
        return made, (self.path,)

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
        super().calculate(atoms, list(properties), list(system_changes))
        atoms = self.atoms
        if atoms is None:
            raise UserError("There is no structure to compute: give one.")
        self._check(atoms)
        source, target, vectors = self._graph(atoms)
        energies, forces, virial = self._ask(atoms, source, target, vectors)
        told = self.about["energy"]
        energy = told["scale"] * float(energies.sum()) + told["shift"]
        if told["references"]:
            energy += float(np.take(told["references"], atoms.numbers).sum())
        if not (math.isfinite(energy) and (forces is None or np.isfinite(forces).all())):
            self._edges = None
            raise Exploded(ANSWER.format(formula=atoms.get_chemical_formula()))
        self.results = {"energy": energy, "free_energy": energy}
        if forces is not None:
            self.results["forces"] = forces
        stressed = "stress" in self.implemented_properties and bool(_periodic(atoms).all())
        if virial is not None and stressed:
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / atoms.get_volume())

    def _check(self, atoms: Atoms) -> None:
        """Refuse what no model could answer, and elements that this one does not know."""
        if not len(atoms):
            raise UserError("There is a structure without atoms: leave it out.")
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell).all()):
            raise Exploded(POSITIONS.format(formula=atoms.get_chemical_formula()))
        known = self.about["elements"]
        numbers = np.unique(atoms.numbers)
        strange = numbers[(numbers < 1) | (numbers > self.about["numbers"])]
        if known is not None and not len(strange):
            strange = np.setdiff1d(numbers, known)
        if len(strange):
            named = [
                chemical_symbols[z] if 0 < z < len(chemical_symbols) else f"Z={z}" for z in strange
            ]
            raise UserError(
                f"A structure of {len(atoms)} atoms has {', '.join(named)}, on which the model was "
                "not trained: leave such structures out, or take a model that knows it."
            )

    def _graph(self, atoms: Atoms) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        edges = self._edges
        if edges is None or not edges.serve(atoms, 0.4999 * self.skin):
            edges = self._edges = _Edges(atoms, self.about["graph"], self.skin)
            self.searches += 1
        found = edges.within_cutoff(atoms)
        if not len(found[0]) and self.about["model"] == "painn":
            raise Exploded(
                f"No two atoms of {atoms.get_chemical_formula()} are within "
                f"{self.about['graph']['cutoff']:g} Å of each other, of which the model knows "
                "nothing: look at the last structures that were written."
            )
        return found

    def _ask(
        self,
        atoms: Atoms,
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        vectors: NDArray[Any],
    ) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        """Normalised energies of atoms; forces in eV/Å; and of gradient ones the virial in eV."""
        told = self.about["forces"]
        slope = told is not None and told["from"] == "energy"
        along = torch.from_numpy(vectors).to(self.device, self.dtype).requires_grad_(slope)
        numbers = torch.from_numpy(atoms.numbers.astype(np.int64)).to(self.device)
        ends = [torch.from_numpy(one).to(self.device) for one in (source, target)]
        with torch.set_grad_enabled(slope):
            said = self.network(numbers, *ends, along)
        energies = said[0].detach().double().cpu().numpy()
        if told is None:
            return energies, None, None
        if not slope:
            return energies, told["scale"] * _array(said[1]) + told["shift"], None
        pulls = np.zeros_like(vectors)
        if len(vectors):
            pulls = told["scale"] * _array(torch.autograd.grad(said[0].sum(), along)[0])
        forces = np.full((len(atoms), 3), told["shift"])
        np.add.at(forces, target, pulls)
        np.subtract.at(forces, source, pulls)
        return energies, forces, vectors.T @ pulls


def _array(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()


def _periodic(atoms: Atoms) -> NDArray[np.bool_]:
    """Along which axes, ``(3,)``: of those that ``pbc`` names the ones with an edge."""
    return np.asarray(atoms.pbc & atoms.cell.any(1))


class _Edges:
    """The edges within a cutoff and a skin, from which those within the cutoff are taken.

    Args:
        atoms: the structure, around which it serves.
        graph: of the file.
        skin: Å.
    """

    def __init__(self, atoms: Atoms, graph: dict[str, Any], skin: float) -> None:
        self.cutoff, self.most = graph["cutoff"], graph["max_neighbors"]
        self.both_ways = graph["both_ways"]
        self.atoms = atoms.copy()
        cell, pbc = np.array(atoms.get_cell(complete=True)), _periodic(atoms)
        try:
            wrapped = wrap_positions(atoms.positions, cell, pbc=pbc, eps=0)
        except np.linalg.LinAlgError as error:
            raise UserError(
                f"The vectors of the cell of {atoms.get_chemical_formula()} lie in a plane: mend "
                "the cell."
            ) from error
        (source, target), shifts = neighbours(wrapped, cell, pbc, self.cutoff + skin)
        order = np.lexsort((*shifts.T[::-1], source, target))  # stock's, by which it breaks ties
        self.source, self.target, shifts = source[order], target[order], shifts[order]
        into = wrapped - atoms.positions
        self.offsets = shifts @ cell + into[self.source] - into[self.target]
        self._into = into
        self._images = _single(shifts) @ _single(cell)
        later = np.sign(shifts) @ (9, 3, 1)  # the first of its signs that is not 0 decides
        self.first = (self.source < self.target) | ((self.source == self.target) & (later < 0))
        self.crowded = len(atoms) > 0 and np.bincount(self.target, minlength=1).max() > self.most

    def serve(self, atoms: Atoms, most: float) -> bool:
        """Whether nothing but positions has changed, and those by at most ``most`` Å."""
        last = self.atoms
        if not (
            np.array_equal(last.numbers, atoms.numbers)
            and np.array_equal(last.cell, atoms.cell)
            and np.array_equal(last.pbc, atoms.pbc)
        ):
            return False
        moved = atoms.positions - last.positions
        return bool(np.einsum("ij,ij->i", moved, moved).max() < most**2)

    def within_cutoff(
        self, atoms: Atoms
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """Sources and targets ``(E,)``, and the ways from target to source, Å, ``(E, 3)``."""
        position = atoms.positions
        vectors = position[self.source] - position[self.target] + self.offsets
        squares = np.einsum("ij,ij->i", vectors, vectors)
        kept = np.flatnonzero((squares <= self.cutoff**2) & (squares > SAME_ATOM))
        if self.crowded:
            kept = self._nearest(kept, position)
        if self.both_ways:
            kept = kept[self.first[kept]]
        source, target, vectors = self.source[kept], self.target[kept], vectors[kept]
        if not self.both_ways:
            return source, target, vectors
        return (
            np.concatenate([source, target]),
            np.concatenate([target, source]),
            np.concatenate([vectors, -vectors]),
        )

    def _nearest(self, kept: NDArray[np.int64], positions: NDArray[Any]) -> NDArray[np.int64]:
        """Of the edges that end at an atom the nearest, as many as the model takes.

        An atom's images on both sides are equally far, and in a lattice so are many atoms: which of
        them are kept changes the energy. So distances are stock's, in its precision and order.
        """
        source, target = self.source[kept], self.target[kept]
        at = _single(positions + self._into)
        ways = at[target] - (at[source] + self._images[kept])
        squares = ways[:, 0] ** 2 + ways[:, 1] ** 2 + ways[:, 2] ** 2
        counts = np.bincount(target, minlength=len(at))
        if counts.max() <= self.most:
            return kept
        starts = np.cumsum(counts) - counts
        row = torch.full((len(at), int(counts.max())), torch.inf)  # an atom's, as in stock
        row[target, np.arange(len(target)) - starts[target]] = torch.from_numpy(squares)
        nearest = row.sort(dim=1).indices[:, : self.most].numpy()  # which leaves ties to torch
        there = np.arange(nearest.shape[1]) < counts[:, None]
        return np.sort(kept[(nearest + starts[:, None])[there]])


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def read_about(path: Path) -> dict[str, Any]:
    """What a module file says of itself, checked; nothing of it is run.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise UserError(f"The module {path} does not exist: give a file of `export --module`.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [one for one in archive.infolist() if one.filename.endswith(f"/{ABOUT}")]
            if not names or names[0].file_size > MAX_JSON:
                raise UserError(
                    f"{path} was not written by `fairchem-kd export --module`: it does not say "
                    "what it is a model of; export it anew."
                )
            told = parse_json(archive.read(names[0]).decode())
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, Unreadable) as error:
        raise UserError(f"The module {path} cannot be read ({error}): copy it again.") from error
    if isinstance(told, dict) and told.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {told.get('format')!r}, and this reads {FORMAT}: load it with the "
            "loader that was written beside it, or export it anew."
        )
    if wrong := _first_wrong(told):
        raise UserError(f"The module {path} is damaged: {wrong}; copy it again, or export it anew.")
    return told


def _first_wrong(told: Any) -> str:
    """What is not as :mod:`fairchem_kd.models.module_file` has it; empty where nothing is."""
    if not isinstance(told, dict):
        return "what it says of itself is no mapping"
    graph, energy, forces = (told.get(name) for name in ("graph", "energy", "forces"))
    if told.get("model") not in ("painn", "schnet"):
        return "model is neither painn nor schnet"
    if not (isinstance(graph, dict) and _number(graph.get("cutoff")) and graph["cutoff"] > 0):
        return "graph.cutoff is no length"
    if type(graph.get("max_neighbors")) is not int or graph["max_neighbors"] < 1:
        return "graph.max_neighbors is no number of neighbours"
    if not isinstance(graph.get("both_ways"), bool):
        return "graph.both_ways is neither true nor false"
    for name, one in (("energy", energy), ("forces", forces)):
        if one is None and name == "forces":
            continue
        if not (isinstance(one, dict) and _number(one.get("scale")) and _number(one.get("shift"))):
            return f"{name} has no scale and shift"
    if forces is not None and forces.get("from") not in ("head", "energy"):
        return "forces.from is neither head nor energy"
    references = energy.get("references")  # type: ignore[union-attr]
    if not (isinstance(references, list) and all(map(_number, references))):
        return "energy.references are no numbers"
    if type(told.get("numbers")) is not int or told["numbers"] < 1:
        return "numbers is no atomic number"
    if references and len(references) <= told["numbers"]:
        return "energy.references are fewer than its elements"
    elements = told.get("elements")
    if elements is not None and not (
        isinstance(elements, list) and all(type(one) is int for one in elements)
    ):
        return "elements are no atomic numbers"
    return "" if isinstance(told.get("torch"), str) else "torch is no version"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _load(path: Path, version: str) -> torch.nn.Module:
    """The network of a file.

    Raises:
        UserError: this version of torch cannot load it.
    """
    log = logging.getLogger("torch.export")  # which tells at length of what is told below
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), weights_only():
            warnings.simplefilter("ignore")  # of torch's own internals
            return torch.export.load(str(path)).module()
    except Exception as error:
        lines = str(error).splitlines() or ["no more is said"]
        raise UserError(
            f"torch {torch.__version__} cannot load {path}, which torch {version} wrote "
            f"({type(error).__name__}: {lines[0]}): export it anew with this torch, or load it "
            f"with torch {version}."
        ) from error
    finally:
        log.setLevel(level)
