"""Does a store still say what its teacher says?

The key of a store holds a digest of the teacher's weights and config, but what the teacher says
depends on the code around it too. Random entries are asked for again, each structure alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from fairchem_kd.errors import UserError
from fairchem_kd.store import Column, Structure
from fairchem_kd.teachers.answers import EDGES, by_structure, fits, output_column
from fairchem_kd.teachers.stored import StoredTeacher

#: How far an answer may be off whatever the teacher's own dependence on its batch: energies in eV
#: per atom, other outputs of structures in what the teacher's normaliser says they vary by, all
#: else relative to its root mean square.
TOLERANCE = 1e-3
_ENERGY = output_column("energy")
#: The share of edges that rounding may put on the other side of a cutoff.
_AT_THE_CUTOFF = 0.02
_SLACK = 10.0  # times the dependence that was measured when the store was made, or now
_ROUNDING = 1e-6  # Å; positions in float32 are known to no more
_MOVED = 4  # copies of a structure, each moved by that


@dataclass(frozen=True)
class Difference:
    """The difference of one column that is the largest beside its limit, of all asked for again."""

    column: str
    value: float
    entry: str  #: which it was found in
    limit: float  #: what the teacher's answers may differ by without having changed


def batch_of(structures: Sequence[Structure], device: torch.device | str = "cpu") -> Batch:
    """Structures of a store as a batch for a model."""
    samples = []
    for one in structures:
        sample = Data(
            pos=torch.from_numpy(np.array(one.pos, np.float32)),
            cell=torch.from_numpy(np.array(one.cell, np.float32))[None],
            atomic_numbers=torch.from_numpy(np.array(one.numbers, np.int64)),
            natoms=len(one.numbers),
        )
        if one.pbc is not None:
            sample.pbc = torch.from_numpy(np.array(one.pbc, bool))[None]
        if one.tags is not None:
            sample.tags = torch.from_numpy(np.array(one.tags, np.int64))
        samples.append(sample)
    return Batch.from_data_list(samples).to(device)


def difference(
    column: Column, one: np.ndarray, other: np.ndarray, atoms: int, spread: float | None = None
) -> float:
    """How far two values are apart (see `TOLERANCE`); infinite where one alone is not finite.

    Args:
        column: of both.
        one, other: values.
        atoms: of the structure.
        spread: of an output of structures, where that is known.
    """
    if column.name == EDGES:
        return max(0.0, _not_shared(one, other) - _AT_THE_CUTOFF)
    if one.shape != other.shape:
        return 0.0  # other edges, which is told of the edges themselves
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        same = np.array_equal(np.isfinite(one), np.isfinite(other))
        return 0.0 if same else float("inf")
    worst = float(np.abs(one - other).max(initial=0.0))
    if column.name == _ENERGY:
        return worst / max(atoms, 1)
    if column.per == "structure" and spread:
        return worst / spread
    scale = float(np.sqrt(np.mean(np.square(other, dtype=np.float64)))) if other.size else 0.0
    floor = 0.01 if column.name.startswith(("output:", "atom_energy")) else 1e-6
    return worst / max(scale, floor)


def _not_shared(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the edges, ``(E, 5)`` of each, that only one of the two has."""
    ours, theirs = ({tuple(edge) for edge in edges.tolist()} for edges in (one, other))
    return len(ours ^ theirs) / max(len(ours | theirs), 1)


def _apart(
    teacher: StoredTeacher, column: Column, one: np.ndarray, other: np.ndarray, atoms: int
) -> float:
    """`difference`, where the teacher's normaliser says by how much an output varies."""
    spread = teacher.live.spread(column.name.partition(":")[2])
    return difference(column, one, other, atoms, spread)


def batch_dependence(
    teacher: StoredTeacher, batch: Batch, some: int, device: torch.device
) -> dict[str, float]:
    """By column, how far the answers to the first structures of a batch depend on the others.

    Rounding, where features are kept in half precision, is part of it.
    """
    from fairchem_kd.stock.structures import pick

    answers = by_structure(teacher.live.teach(batch.clone().to(device), teacher.requests),
                           teacher.columns)  # fmt: skip
    found = dict.fromkeys(teacher.names, 0.0)
    for system in range(min(some, len(batch.natoms))):
        alone = pick(batch, [system]).to(device)
        single = by_structure(teacher.live.teach(alone, teacher.requests), teacher.columns)[0]
        atoms = int(batch.natoms[system])
        for column in teacher.columns:
            value = answers[system][column.name]
            kept = column.decode(column.encode(value))
            found[column.name] = max(
                found[column.name],
                _apart(teacher, column, kept, single[column.name], atoms),
            )
    return found


def usual(column: str, dependence: Mapping[str, float]) -> float:
    """By how much a column may differ, as far as that was known when the store was made."""
    return max(TOLERANCE, _SLACK * dependence.get(column, 0.0))


def unrest(
    teacher: StoredTeacher, structure: Structure, columns: Sequence[Column], device: torch.device
) -> dict[str, float]:
    """By column, how far answers about one structure depend on what rounding makes of it.

    A model that looks at the nearest neighbours alone takes others where many are as near, as on
    slabs: its energy then jumps by some meV per atom as atoms move by less than float32 can tell.
    """
    rng = np.random.default_rng(0)
    pos = np.asarray(structure.pos, np.float64)
    moved = [
        replace(structure, pos=(pos + _ROUNDING * rng.normal(size=pos.shape)).astype(np.float32))
        for _ in range(_MOVED)
    ]
    answer = teacher.live.teach(batch_of([structure, *moved], device), teacher.requests)
    first, *others = by_structure(answer, columns)
    atoms = len(structure.numbers)
    return {
        column.name: max(
            _apart(teacher, column, one[column.name], first[column.name], atoms) for one in others
        )
        for column in columns
    }


def differences(
    teacher: StoredTeacher, samples: int, device: torch.device, dependence: Mapping[str, float]
) -> tuple[int, list[Difference]]:
    """Ask the live teacher again about random entries.

    Args:
        teacher: with its store.
        samples: how many entries.
        device: of the live teacher.
        dependence: of its answers on the batch, as the store's card has it.

    Returns:
        How many entries were compared, and by column the difference that is the largest beside
        what the teacher's answer about that structure may differ by.
    """
    draw = random.SystemRandom()
    shards = [shard for shard in teacher.reader.shards if len(shard.entries)]
    worst: dict[str, Difference] = {}
    compared = 0
    for _ in range(samples if shards else 0):
        shard = draw.choices(shards, [len(s.entries) for s in shards])[0]
        row = draw.randrange(len(shard.entries))
        structure = teacher.reader.structure(shard, row)
        if structure is None:
            teacher.reader.damaged += 1
            continue
        columns = [column for column in teacher.columns if column.name in shard.names]
        kept = teacher.reader.read(structure.key(), [column.name for column in columns])
        if kept is None or not columns:
            continue
        if not fits(kept, len(structure.numbers), columns):
            teacher.reader.damaged += 1
            continue
        answer = teacher.live.teach(batch_of([structure], device), teacher.requests)
        now = by_structure(answer, columns)[0]
        compared += 1
        own: dict[str, float] | None = None
        for column in columns:
            value = _apart(
                teacher, column, kept[column.name], now[column.name], len(structure.numbers)
            )
            limit = usual(column.name, dependence)
            if value > limit:  # it has changed, or is one that rounding decides
                own = unrest(teacher, structure, columns, device) if own is None else own
                limit = max(limit, _SLACK * own[column.name])
            entry = f"record {row} of {shard.name} ({structure.key().hex()})"
            known = worst.get(column.name)
            if known is None or value / limit > known.value / known.limit:
                worst[column.name] = Difference(column.name, value, entry, limit)
    return compared, list(worst.values())


def refuse_drift(found: Sequence[Difference], store: object) -> None:
    """Refuse a store that says something else than the teacher.

    Raises:
        UserError: naming the entry and the difference.
    """
    for one in found:
        if one.value > one.limit:
            unit = "eV per atom" if one.column == _ENERGY else "of its spread"
            raise UserError(
                f"The store {store} does not say what the teacher says: {one.column} of "
                f"{one.entry} differs by {one.value:.3g} {unit}, where {one.limit:.3g} is usual. "
                "The code or its versions have changed since it was filled: remove the store, name "
                "another one in task.distillation.teacher.store, or set that to off."
            )
