"""Between a teacher's answers to a batch and the records of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fairchem_kd.features import GRAPH, Request
from fairchem_kd.stock import periodicity
from fairchem_kd.store import Column, Structure, names
from fairchem_kd.store.names import atom_energy_column, output_column
from fairchem_kd.teachers.base import Taught
from fairchem_kd.teachers.edges import by_ends, systems_of

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from fairchem_kd.features.address import Kind

#: How features are kept; outputs are always kept whole.
PRECISIONS = {"fp32": "<f4", "fp16": "<f2", "bf16": "bf16"}


def feature_column(request: Request) -> str:
    return names.feature_column(request.address, request.form)


#: The column of the edges; those of features of edges have a row for each of its rows.
EDGES = feature_column(GRAPH)


def requests_of(columns: Iterable[str]) -> list[Request]:
    """The features among the names of columns."""
    found = []
    for name in columns:
        kind, _, rest = name.partition(":")
        if kind == "feature":
            address, _, form = rest.rpartition(":")
            found.append(Request(address, cast("Kind", form)))
    return found


def structures_of(batch: Batch, which: Sequence[int] | None = None) -> list[Structure]:
    """The structures of a batch in host memory, as they are known whatever shares their batch.

    A structure that is not periodic along all axes gets room there where others of its batch are
    (:mod:`fairchem_kd.stock.samples`); here always, so that its key does not depend on them.

    Args:
        batch: of B structures.
        which: of them; all B where it is None.
    """
    natoms = batch.natoms.tolist()
    numbers, pos = _split(batch.atomic_numbers.long(), natoms), _split(batch.pos, natoms)
    tags = _split(batch.tags.long(), natoms) if batch.get("tags") is not None else None
    cells = batch.cell.view(-1, 3, 3).numpy()
    pbc = batch.pbc.view(-1, 3).numpy() if batch.get("pbc") is not None else None
    everywhere = np.ones(3, dtype=bool)
    return [
        Structure(
            numbers[i],
            pos[i],
            periodicity.everywhere(cells[i], None if pbc is None else pbc[i], pos[i]),
            everywhere,
            None if tags is None else tags[i],
        )
        for i in (range(len(natoms)) if which is None else which)
    ]


def columns_of(said: Taught, levels: Mapping[str, str], precision: str) -> list[Column]:
    """The columns of a store for answers like this one.

    Args:
        said: outputs, features, and what atoms give to outputs where it was asked for.
        levels: ``system`` or ``atom`` by output.
        precision: of the features, one of `PRECISIONS`.
    """
    columns = []
    for name, values in said.outputs.items():
        per: Literal["structure", "atom"] = "atom" if levels[name] == "atom" else "structure"
        columns.append(Column(output_column(name), per, tuple(values.shape[1:]), "<f8"))
    for name, values in said.atom_energies.items():
        columns.append(Column(atom_energy_column(name), "atom", tuple(values.shape[1:]), "<f8"))
    for request, values in said.features.items():
        shape = tuple(values.shape[1:])
        dtype = "<i4" if request == GRAPH else PRECISIONS[precision]
        rows: Literal["atom", "edge"] = "edge" if request.form == "edge" else "atom"
        columns.append(Column(feature_column(request), rows, shape, dtype))
    return columns


def by_column(said: Taught) -> dict[str, Tensor]:
    """An answer's values by column, those of edges in the order of `by_ends`."""
    values = {output_column(name): value for name, value in said.outputs.items()}
    values |= {atom_energy_column(name): value for name, value in said.atom_energies.items()}
    features = dict(said.features)
    if GRAPH in features:
        order = by_ends(features[GRAPH])
        features |= {r: v[order] for r, v in features.items() if r.form == "edge"}
    return values | {feature_column(request): value for request, value in features.items()}


def by_structure(said: Taught, columns: Sequence[Column]) -> list[dict[str, np.ndarray]]:
    """An answer's values by column, for each of its B structures."""
    values, natoms = by_column(said), said.natoms.tolist()
    rows = {"atom": natoms}
    if EDGES in values:
        systems = systems_of(values[EDGES], said.natoms)
        rows["edge"] = systems.bincount(minlength=len(natoms)).tolist()
        values[EDGES] = values[EDGES].clone()
        values[EDGES][:, :2] -= (said.natoms.cumsum(0) - said.natoms)[systems][:, None]
    cut: list[dict[str, np.ndarray]] = [{} for _ in natoms]
    for column in columns:
        value = values[column.name].cpu()
        own = column.per in rows
        parts = _split(value, rows[column.per]) if own else list(value.numpy())
        for one, part in zip(cut, parts, strict=True):
            one[column.name] = part
    return cut


def fits(record: Mapping[str, np.ndarray], natoms: int, columns: Sequence[Column]) -> bool:
    """Whether the values of a record are those of a structure of so many atoms, in these columns.

    A shard's header and index say how a record is to be read, and may have been written for
    another model, or for another structure.
    """
    edges = len(record[EDGES]) if EDGES in record else 0
    rows = {"atom": (natoms,), "edge": (edges,), "structure": ()}
    if edges:
        ends = record[EDGES][:, :2]
        if ends.min() < 0 or ends.max() >= natoms:
            return False
    return all(
        record[column.name].shape == (*rows[column.per], *column.shape) for column in columns
    )


def joined(
    records: Sequence[dict[str, np.ndarray] | None],
    natoms: Sequence[int],
    columns: Sequence[Column],
) -> dict[str, Tensor]:
    """Values by column of B structures, row after row; zeros where a structure has no record.

    Such a structure has no edges.
    """
    values = {}
    for column in columns:
        if column.per == "edge":
            values[column.name] = _edges_joined(records, natoms, column)
            continue
        atoms = column.per == "atom"
        rows = sum(natoms) if atoms else len(natoms)
        dtype = np.float64 if column.dtype == "<f8" else np.float32
        whole = np.zeros((rows, *column.shape), dtype)
        start = 0
        for record, number in zip(records, natoms, strict=True):
            stop = start + (number if atoms else 1)
            if record is not None:
                whole[start:stop] = record[column.name]
            start = stop
        values[column.name] = torch.from_numpy(whole)
    return values


def _edges_joined(
    records: Sequence[dict[str, np.ndarray] | None], natoms: Sequence[int], column: Column
) -> Tensor:
    graph = column.name == EDGES
    dtype = np.int64 if graph else np.float32
    parts: list[Any] = [np.zeros((0, *column.shape), dtype)]
    start = 0
    for record, number in zip(records, natoms, strict=True):
        if record is not None:
            part: Any = np.array(record[column.name], dtype)
            if graph:
                part[:, :2] += start
            parts.append(part)
        start += number
    return torch.from_numpy(np.concatenate(parts))


def taught(
    values: Mapping[str, Tensor], natoms: Tensor, requests: Sequence[Request], origin: str
) -> Taught:
    """The answer that values by column, all rows together, stand for."""
    prefix = output_column("")
    outputs = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
    features = {request: values[feature_column(request)] for request in requests}
    atom_energies = {}
    for name, value in values.items():
        kind, _, output = name.partition(":")
        if kind == "atom_energy":
            atom_energies[output or "energy"] = value
    return Taught(natoms, outputs, features, atom_energies, origin=origin)


def _split(values: Tensor, natoms: Sequence[int]) -> list[Any]:
    return [part.numpy() for part in values.split(list(natoms))]
