"""Structures in which no atom has a neighbour: stock's models fail on them while they say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.errors import UserError
from fairchem_kd.stock.periodicity import axes

if TYPE_CHECKING:
    from ase import Atoms
    from torch import nn
    from torch_geometric.data import Batch

#: Å: no model that fairchem ships sees less.
SHORTEST_CUTOFF = 6.0


def without_neighbours(atoms: Atoms, cutoff: float) -> bool:
    """Whether no two atoms, images included, are within ``cutoff`` (Å) of each other."""
    from ase.neighborlist import neighbor_list

    if len(atoms) > 1:  # mostly the first atom has one
        distances = atoms.get_distances(0, range(1, len(atoms)), mic=bool(atoms.pbc.any()))
        if (distances < cutoff).any():
            return False
    return len(neighbor_list("i", atoms, cutoff)) == 0


def cutoff_of(model: nn.Module) -> float | None:
    """How far a model looks, in Å; None where it does not say."""
    cutoff = getattr(getattr(model, "backbone", model), "cutoff", None)
    return float(cutoff) if isinstance(cutoff, int | float) else None


def sample_without_neighbours(sample: Any, cutoff: float) -> bool:
    """:func:`without_neighbours` of a sample of a data set; False of one that is not finite."""
    from ase import Atoms

    cell = np.asarray(sample.cell, dtype=np.float64).reshape(3, 3)
    if not (np.isfinite(cell).all() and np.isfinite(np.asarray(sample.pos)).all()):
        return False
    pbc = getattr(sample, "pbc", None)
    given = None if pbc is None else np.asarray(pbc, dtype=bool).reshape(3)
    atoms = Atoms(
        numbers=np.asarray(sample.atomic_numbers, dtype=np.int64),
        positions=np.asarray(sample.pos, dtype=np.float64),
        cell=cell,
        pbc=axes(given, cell),
    )
    return without_neighbours(atoms, cutoff)


def refuse_isolated(batch: Batch, model: nn.Module) -> None:
    """Refuse a batch on which ``model`` has just failed, where that is why.

    Stock's sentence about images without neighbours fails itself, for their ids.

    Raises:
        UserError: naming the structures.
    """
    from ase import Atoms

    cutoff = cutoff_of(model)
    if cutoff is None or batch.get("cell") is None:
        return
    natoms, cells = batch.natoms.tolist(), batch.cell.view(-1, 3, 3).cpu().numpy()
    pbc = batch.get("pbc")
    stops = np.cumsum(natoms)
    found = []
    for system, (number, stop) in enumerate(zip(natoms, stops, strict=True)):
        atoms = Atoms(
            numbers=batch.atomic_numbers[stop - number : stop].long().cpu().numpy(),
            positions=batch.pos[stop - number : stop].detach().cpu().numpy(),
            cell=cells[system],
            pbc=True if pbc is None else pbc.view(-1, 3)[system].cpu().numpy(),
        )
        if without_neighbours(atoms, cutoff):
            found.append(f"{name_of(batch, system)} ({atoms.get_chemical_formula()})")
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"No atom of structure {'; '.join(found[:3])}{more} has a neighbour within {cutoff:g} "
            "Å, and the model needs one: leave such structures out, isolated atoms for example."
        )


def name_of(batch: Any, system: int) -> str:
    """``sid 12, fid 3`` of one structure of a batch, as far as the data set names it."""
    words = [
        f"{key} {value[system]}"
        for key in ("sid", "fid")
        if key in batch and (value := batch[key]) is not None and len(value) > system
    ]
    return ", ".join(words).replace("tensor(", "").replace(")", "") or f"{system} of its batch"
