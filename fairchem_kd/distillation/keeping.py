"""Keep what the teacher says: a store is found or made, filled, verified, and read from then on.

    live teacher -> folder and card -> ask for what is missing -> ask some again -> StoredTeacher

Whatever stands in the way of a store (a folder that cannot be written, a full disk, a limit) leaves
the teacher live, for all or for the rest, and is said in one line. What would make a wrong store
pass for a right one is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fairchem_kd.distillation.companions import Companions
from fairchem_kd.distillation.config import TeacherConfig
from fairchem_kd.features import Request
from fairchem_kd.features.architecture import backbone_of
from fairchem_kd.stock.structures import pick
from fairchem_kd.store import STRUCTURE, Card, Column
from fairchem_kd.store.format import ENTRY
from fairchem_kd.teachers.drift import batch_dependence, differences, refuse_drift
from fairchem_kd.teachers.filling import (
    GROUP,
    Filling,
    Source,
    dataset_mark,
    note_filled,
    source_of,
)
from fairchem_kd.teachers.live import LiveTeacher
from fairchem_kd.teachers.place import check_card, room, size_of, store_folder, writable
from fairchem_kd.teachers.stored import StoredTeacher, columns_for
from fairchem_kd.training.checks import check_finite
from fairchem_kd.training.ranks import rank, refused_by_all, same_on_ranks, world_size

if TYPE_CHECKING:
    from torch_geometric.data import Batch

SAMPLES = 4  # entries that are asked for again at the start of a run
_PROBED = 4  # structures of which the dependence on their batch is measured
_SEEN = 0.7  # of its structures that a training has to see before all are asked for ahead


@dataclass(frozen=True)
class Wanted:
    """Structures that a training will want the teacher's word about."""

    source: Source
    draws: float  #: how often it will, over all ranks


@dataclass(frozen=True)
class _Place:
    """What the first rank found, told to the others."""

    folder: Path | None
    why: str = ""  # the folder is not written to
    dependence: Mapping[str, float] | None = None
    was_there: bool = False


def keep(
    live: LiveTeacher,
    requests: Sequence[Request],
    config: TeacherConfig,
    wanted: Sequence[Wanted],
    *,
    run_dir: str,
    device: torch.device,
    part: tuple[int, int] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> StoredTeacher | None:
    """A teacher that reads what is kept of ``live``'s answers; None where it has to stay live.

    A collective. Asks for what the store lacks of what the training will often want, with all
    ranks, before it returns.

    Args:
        live: the teacher, on the device.
        requests: the features that are kept with its outputs.
        config: ``task.distillation.teacher``.
        wanted: what the training will ask.
        run_dir: where runs make their folders.
        part: which of how many parts is filled here; by default this rank's of all ranks'.
        stop: whether to leave early, at the next group of structures.

    Raises:
        UserError: a store of another teacher or precision, or one that says something else than the
            teacher; a structure that the teacher cannot be asked about.
    """
    folder = store_folder(str(config.store), live.digest, config.store_features, run_dir)
    if folder is None or not wanted:
        return None
    if not getattr(backbone_of(live.frozen.model), "otf_graph", True):
        _say("The teacher reads graphs from the data set, so what it says is not kept.")
        return None
    with refused_by_all():
        first = next(b for i in range(10**9) if (b := wanted[0].source.make(i)) is not None)
        _check(live)(first)
        one = pick(first, [0]).to(device)
        columns, edges_per_atom = columns_for(live, one, requests, config.store_features)
        place = _find(live, folder, config, columns, first, requests, device)
    place = same_on_ranks(place)
    if place.why and not place.was_there:
        _say(f"What the teacher says is not kept: {place.why}.")
        return None
    teacher = StoredTeacher(live, folder, requests, columns)
    teacher.edges_per_atom = edges_per_atom
    if place.was_there:
        _verify(teacher, place.dependence or {}, device)
    if place.why:
        _say(f"The store {folder} is read, and not added to: {place.why}.")
    else:
        _fill(live, teacher, config, wanted, device, part, stop)
    return teacher


def _find(
    live: LiveTeacher,
    folder: Path,
    config: TeacherConfig,
    columns: list[Column],
    first: Batch,
    requests: Sequence[Request],
    device: torch.device,
) -> _Place:
    """The store, made where there is none; on the first rank."""
    if rank() != 0:
        return _Place(None)
    card = Card.read(folder)
    why = writable(folder)
    if why:
        why = f"{folder} cannot be written ({why})"
    if card is not None:
        check_card(card, live, folder, config.store_features)
        return _Place(folder, why, card.dependence, was_there=True)
    if why:
        return _Place(folder, why)
    made = StoredTeacher(live, folder, requests, columns)
    dependence = batch_dependence(made, first, _PROBED, device)
    card = Card(live.digest, live.name, config.store_features, dependence, live.precision)
    try:
        card.write(folder)
    except OSError as error:
        return _Place(folder, f"{folder} cannot be written ({error.strerror})")
    return _Place(folder, "", dependence)


def _verify(teacher: StoredTeacher, dependence: Mapping[str, float], device: torch.device) -> None:
    with refused_by_all():
        if rank() == 0 and len(teacher.reader):
            _, found = differences(teacher, SAMPLES, device, dependence)
            refuse_drift(found, teacher.folder)


def _fill(
    live: LiveTeacher,
    teacher: StoredTeacher,
    config: TeacherConfig,
    wanted: Sequence[Wanted],
    device: torch.device,
    part: tuple[int, int] | None,
    stop: Callable[[], bool],
) -> None:
    limit = min(config.max_gb * 1e9, size_of(teacher.folder) + 0.5 * room(teacher.folder))
    own, parts = part or (rank(), world_size())
    check = _check(live)
    filling = Filling(teacher, part=own, parts=parts, limit=limit, check=check, stop=stop)
    often = [w.source for w in asked_ahead(wanted)]
    seldom = [w.source.name for w in wanted if w.source not in often]
    if seldom and not all(filling.is_marked(w.source) for w in wanted):
        _say(
            f"This training sees only a part of {', '.join(seldom)}: of what is not in the store, "
            "the teacher is asked at every step."
        )
    missing = [source for source in often if not filling.is_marked(source)]
    if not missing:
        teacher.reader.refresh()  # another run may have ended since the reader looked
        size = size_of(teacher.folder) / 1e6
        _say(f"What the teacher is asked is all in {teacher.folder} ({size:.0f} MB).")
        return
    number = sum(source.structures for source in missing)
    _say(
        f"Keeping what the teacher says of {number} structures ({_names(missing)}) in "
        f"{teacher.folder}: about {_estimate(teacher, missing)}"
    )
    began = time.perf_counter()
    with refused_by_all():
        filling.fill(missing, device)
    asked, ended = _gathered(filling)
    if asked:
        took = time.perf_counter() - began
        _say(f"Asked the teacher about {asked} structures in {took:.1f} s ({asked / took:.0f}/s)")
    if ended:
        _say(f"The store {teacher.folder} lacks some: {ended}. The teacher says the rest live.")
    elif rank() == 0 and parts == world_size():
        note_filled(teacher.folder, teacher.names, missing)
    teacher.reader.refresh()


def _gathered(filling: Filling) -> tuple[int, str]:
    """Of all ranks: how many structures were asked about, and why one of them ended early."""
    told: list[Any] = [(filling.asked, filling.ended)]
    if world_size() > 1:
        told = [None] * world_size()
        dist.all_gather_object(told, (filling.asked, filling.ended))
    return sum(asked for asked, _ in told), next((ended for _, ended in told if ended), "")


def _check(live: LiveTeacher) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        check_finite(batch, ())
        live.check_elements(batch.atomic_numbers)

    return check


def _estimate(teacher: StoredTeacher, sources: Sequence[Source]) -> str:
    """Megabytes of the records of all these in words, from a group of each."""
    whole = of_edges = 0.0
    for source in sources:
        batch = source.make(source.groups // 2)
        if batch is not None:
            atoms = batch.natoms.double().mean().item()
            rows = round(atoms), round(atoms * teacher.edges_per_atom)
            record = sum(column.size(*rows) for column in (*STRUCTURE, *teacher.columns))
            whole += source.structures * (record + ENTRY.itemsize)
            edges = sum(column.size(*rows) for column in teacher.columns if column.per == "edge")
            of_edges += source.structures * edges
    words = _megabytes(whole)
    if of_edges:
        words += (
            f", {_megabytes(of_edges)} of it for edges ({teacher.edges_per_atom:.0f} an atom), "
            "which a loss on the teacher's edges compares"
        )
    return words


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size > 1e7 else f"{size / 1e6:.2g} MB"


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources)


def _say(line: str) -> None:
    if rank() == 0:
        logging.info(line)


def asked_ahead(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those of which the teacher is asked before the training: it will see most of them."""
    return [one for one in wanted if one.draws >= _SEEN * one.source.structures]


def wanted_structures(
    train: tuple[Any, dict[str, Any]],
    collate: Callable[[list[Any]], Batch],
    companions: Companions | None,
    validated: tuple[Any, dict[str, Any]] | None,
    *,
    steps: int,
    per_step: int,
) -> list[Wanted]:
    """What a training will ask its teacher about.

    Args:
        train: the data set and its config.
        collate: makes a batch of samples.
        companions: what goes with the labelled structures.
        validated: the same of the validation set, where the teacher is asked about it.
        steps: of the whole training.
        per_step: labelled structures of a step, over all ranks.
    """
    named = [("dataset.train", *train, float(steps * per_step))]
    unlabelled = companions.unlabelled if companions is not None else None
    if unlabelled is not None:
        settings = dict(unlabelled.options.dataset) | {"skip": unlabelled.options.skip}
        share = unlabelled.options.share / (1 - unlabelled.options.share)
        draws = steps * per_step * share
        named.append(("unlabelled.dataset", unlabelled.samples, settings, draws))
    wanted = [
        Wanted(source_of(name, dataset, collate, dataset_mark(settings, dataset)), draws)
        for name, dataset, settings, draws in named
    ]
    rattler = companions.rattler if companions is not None else None
    if rattler is not None and rattler.pool is not None:
        copies = rattler.options.copies
        for (name, dataset, settings, draws), clean in list(zip(named, wanted, strict=True)):
            told = f"{rattler.pool} {rattler.options}"
            source = _pool(f"rattled copies of {name}", clean.source, rattler,
                           dataset_mark(settings, dataset, told))  # fmt: skip
            wanted.append(Wanted(source, copies * draws))
    if validated is not None:
        dataset, settings = validated
        source = source_of("dataset.val", dataset, collate, dataset_mark(settings, dataset))
        wanted.append(Wanted(source, float("inf")))
    return wanted


def _pool(name: str, clean: Source, rattler: Any, mark: str | None) -> Source:
    """The pooled copies of a source's structures, number after number."""
    size = rattler.pool

    def make(group: int) -> Batch | None:
        number, of = divmod(group, clean.groups)
        batch = clean.make(of)
        return None if batch is None else rattler.from_pool(batch, number)

    return Source(name, size * clean.structures, size * clean.groups, make, mark)


__all__ = ["GROUP", "SAMPLES", "Wanted", "asked_ahead", "keep", "wanted_structures"]
