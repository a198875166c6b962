"""A teacher whose answers are kept: read where they are, asked for live where they are not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairchem_kd.features import GRAPH, FeatureSpec, Request
from fairchem_kd.stock.kept_samples import Memo, memo_of
from fairchem_kd.stock.structures import pick
from fairchem_kd.store import STRUCTURE, Column, Reader
from fairchem_kd.teachers.answers import (
    EDGES,
    by_column,
    columns_of,
    fits,
    joined,
    requests_of,
    structures_of,
    taught,
)
from fairchem_kd.teachers.base import Asked, Taught
from fairchem_kd.teachers.live import LiveTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

#: Under which a batch carries what was read for it: values by column, and `MISSING`.
SAID = "said"
#: A list of the structures without a record; in host memory wherever the batch goes, since reading
#: it off a GPU would wait for the device.
MISSING = "missing"
#: In place of both, of an ensemble: a list of the same for each of its members.
MEMBERS = "members"


class StoredTeacher:
    """Answers by structure out of a store, and of a live teacher for what the store lacks.

    Args:
        live: the teacher whose answers the store keeps.
        folder: the store's.
        requests: the features that are read with the outputs.
        columns: what a record holds of all this (:func:`columns_for`).
    """

    def __init__(
        self,
        live: Asked,
        folder: Path,
        requests: Sequence[Request],
        columns: Sequence[Column],
    ) -> None:
        self.live = live
        self.folder = folder
        self.requests = tuple(requests)
        self.columns = list(columns)
        self.names = [column.name for column in self.columns]
        self.reader = Reader(folder)
        #: edges of an atom, where the store keeps edges: of the structures that were asked for them
        self.edges_per_atom = 0.0
        self._told = False

    @property
    def identity(self) -> str:
        return self.live.identity

    @property
    def levels(self) -> Mapping[str, str]:
        return self.live.levels

    @property
    def energy_name(self) -> str | None:
        return self.live.energy_name

    def specs(self, requests: Sequence[Request]) -> Mapping[Request, FeatureSpec]:
        return self.live.specs(requests)

    def require_outputs(self, names: Iterable[str]) -> None:
        self.live.require_outputs(names)

    def check_elements(self, atomic_numbers: Tensor) -> None:
        self.live.check_elements(atomic_numbers)

    # -- reading ----------------------------------------------------------------------------------

    def said(self, batch: Batch, memos: Sequence[Memo | None] | None = None) -> dict[str, Any]:
        """What the store holds of a batch in host memory: values by column, and `MISSING`.

        Args:
            batch: of B structures.
            memos: of its samples, where what was read before is remembered.
        """
        natoms = batch.natoms.tolist()
        known = (str(self.folder), *self.names)
        remembered = memos or [None] * len(natoms)
        records = [None if memo is None else memo.get(known) for memo in remembered]
        unread = [system for system, record in enumerate(records) if record is None]
        for system, one in zip(unread, structures_of(batch, unread), strict=True):
            record = self.reader.read(one.key(), self.names)
            if record is None or not fits(record, natoms[system], self.columns):
                continue
            records[system] = record
            memo = remembered[system]
            if memo is not None:
                memo.keep(known, record, sum(value.nbytes for value in record.values()))
        missing = [system for system, record in enumerate(records) if record is None]
        return joined(records, natoms, self.columns) | {MISSING: missing}

    def reading(self, collate: Callable[[list[Any]], Batch]) -> Callable[[list[Any]], Batch]:
        """``collate``, which reads too: in a loader's workers, ahead of the step."""
        return Reading(self.said, collate)

    def teach(self, batch: Batch, requests: Sequence[Request], *, outputs: bool = True) -> Taught:
        if not set(requests) <= set(self.requests):
            return self.live.teach(batch, requests, outputs=outputs)
        return self.recall(batch, batch.get(SAID), requests)

    def recall(
        self, batch: Batch, said: Mapping[str, Any] | None, requests: Sequence[Request]
    ) -> Taught:
        """The answer to a batch of which the store has been read; ``said`` None: not yet."""
        if said is None:
            said = self.said(batch.clone().to("cpu"))
        device = batch.pos.device
        values = {name: said[name].to(device, non_blocking=True) for name in self.names}
        if said[MISSING]:
            self._ask(batch, said[MISSING], values)
        return taught(values, batch.natoms, list(requests), self.live.name)

    @contextmanager
    def asked_in_passing(self) -> Iterator[None]:
        """Within the block no line says that the store lacks something."""
        told, self._told = self._told, True
        try:
            yield
        finally:
            self._told = told

    def _ask(self, batch: Batch, missing: list[int], values: dict[str, Tensor]) -> None:
        """Fill the rows of the structures that the store lacks with what the live teacher says."""
        if not self._told and self.live.is_here:
            self._told = True
            logging.info(
                f"Some structures are not in the store {self.folder}: of them the teacher is "
                "asked at every step."
            )
        asked = by_column(self.live.teach(pick(batch, missing), self.requests))
        systems = torch.zeros(len(batch.natoms), dtype=torch.bool)
        systems[missing] = True
        systems = systems.to(batch.pos.device)
        rows = {"structure": systems, "atom": systems[batch.batch]}
        if EDGES in asked:  # numbered as in the batch
            asked[EDGES] = asked[EDGES].clone()
            atoms = rows["atom"].nonzero()[:, 0]
            asked[EDGES][:, :2] = atoms[asked[EDGES][:, :2]]
        for column in self.columns:
            kept, new = values[column.name], asked[column.name]
            if column.per == "edge":  # of which these structures have none yet
                values[column.name] = torch.cat([kept, new.to(kept.dtype)])
                continue
            kept = values[column.name] = kept.clone()
            kept[rows[column.per]] = new.to(kept.dtype)


class Reading:
    """Collates samples, and reads what stores hold of them.

    Args:
        said: gives that, for a batch and the memos of its samples.
        collate: makes a batch of samples.
    """

    def __init__(
        self,
        said: Callable[[Batch, Sequence[Memo | None]], dict[str, Any]],
        collate: Callable[[list[Any]], Batch],
    ) -> None:
        self.said = said
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Batch:
        batch = self.collate(samples)
        batch[SAID] = self.said(batch, [memo_of(sample) for sample in samples])
        return batch


def columns_for(
    live: LiveTeacher, batch: Batch, requests: Sequence[Request], precision: str
) -> tuple[list[Column], float]:
    """The columns that hold this teacher's answers, found by asking it once.

    Args:
        batch: any structures, on the teacher's device.
        precision: of the features, as in `answers.PRECISIONS`.

    Returns:
        The columns, and how many edges an atom has (0 where edges are not asked for).
    """
    said = live.teach(batch, requests)
    edges = len(said.features[GRAPH]) if GRAPH in said.features else 0
    return columns_of(said, live.levels, precision), edges / max(len(batch.pos), 1)


def join_said(parts: Sequence[tuple[Mapping[str, Any], Batch]]) -> dict[str, Any]:
    """What was read of several batches, for all of them joined in this order.

    Args:
        parts: of each batch what was read, and the batch.
    """
    if MEMBERS in parts[0][0]:
        numbers = range(len(parts[0][0][MEMBERS]))
        return {MEMBERS: [join_said([(s[MEMBERS][i], b) for s, b in parts]) for i in numbers]}
    names = [name for name in parts[0][0] if name != MISSING]
    joint: dict[str, Any] = {name: torch.cat([said[name] for said, _ in parts]) for name in names}
    joint[MISSING], start, atoms, edges = [], 0, 0, 0
    for said, batch in parts:
        joint[MISSING] += [start + system for system in said[MISSING]]
        start += len(batch.natoms)
        if EDGES in names:
            joint[EDGES][edges : edges + len(said[EDGES]), :2] += atoms
            edges, atoms = edges + len(said[EDGES]), atoms + len(batch.pos)
    return joint


def requests_in(folder: Path) -> tuple[list[Request], list[Column]]:
    """The features that a store holds, and all columns of answers in it."""
    own = {column.name for column in STRUCTURE}
    columns: dict[str, Column] = {}
    for shard in Reader(folder).shards:
        columns |= {column.name: column for column in shard.columns if column.name not in own}
    return requests_of(columns), list(columns.values())
