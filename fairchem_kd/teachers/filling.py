"""Asking a teacher ahead for all that a store lacks.

The teacher is asked in fixed groups: so many structures, in the order of their data set, whatever
batches a training makes of them. Some models' answers depend a little on what shares their batch
(sums in another order), and this way an answer depends on structure and teacher alone: not on the
run's seed, its batch size, its number of ranks or on when it was killed. A group of which anything
is missing is asked for as a whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fairchem_kd.store import Writer
from fairchem_kd.teachers.answers import by_structure, structures_of
from fairchem_kd.teachers.place import marks, size_of
from fairchem_kd.teachers.stored import StoredTeacher

if TYPE_CHECKING:
    from torch_geometric.data import Batch

GROUP = 32  # structures that are asked for together
_LOOK = 5.0  # seconds between two looks at what other writers have added
_TELL = 30.0  # seconds between two lines, where there is no terminal


@dataclass(frozen=True)
class Source:
    """Structures that a store is to know about, in groups that do not depend on who asks."""

    name: str  #: what a user calls it
    structures: int
    groups: int
    make: Callable[[int], Batch | None]  #: a group, in host memory; None for one without structures
    mark: str | None = None  #: a digest of what it is, where that can be told without reading it


def source_of(
    name: str, dataset: Any, collate: Callable[[list[Any]], Batch], mark: str | None = None
) -> Source:
    """The structures of a data set."""
    size = len(dataset)

    def make(group: int) -> Batch:
        members = range(group * GROUP, min((group + 1) * GROUP, size))
        return collate([dataset[i] for i in members])

    return Source(name, size, -(-size // GROUP), make, mark)


class Filling:
    """Fills one store; several processes and jobs may do so at once.

    Args:
        teacher: whose store it is.
        part: of ``parts`` that divide the groups among them.
        limit: bytes that the store may have.
        check: refuses a batch that the teacher cannot be asked about.
        stop: whether to leave at the next group.
    """

    def __init__(
        self,
        teacher: StoredTeacher,
        *,
        part: int = 0,
        parts: int = 1,
        limit: float = float("inf"),
        check: Callable[[Batch], None] = lambda batch: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.teacher = teacher
        self.part, self.parts = part, parts
        self.check = check
        self.stop = stop
        self.asked = 0  #: structures of which the teacher was asked
        self.ended = ""  #: why it ended before everything was there
        self._writer = Writer(teacher.folder, teacher.columns)
        self._left = limit - (size_of(teacher.folder) if limit < float("inf") else 0)
        self._looked = time.monotonic()

    def fill(self, sources: Sequence[Source], device: torch.device) -> None:
        """Ask for what is missing of the sources, in groups, and keep it.

        A full disk, the limit or a request to stop end it early, and :attr:`ended` says why.

        Raises:
            UserError: a structure that the teacher cannot be asked about.
        """
        wanted = [source for source in sources if not self.is_marked(source)]
        total = sum(source.structures for source in wanted)
        bar = tqdm(total=-(-total // self.parts), desc="asking the teacher", unit="structure",
                   disable=None if self.part == 0 and total else True, leave=False)  # fmt: skip
        began = told = time.monotonic()
        done = 0  # a bar that is not shown does not count
        try:
            with bar:
                for source in wanted:
                    for number in self._own(source.groups):
                        if self.ended or self._stopped():
                            return
                        batch = source.make(number)
                        if batch is None:
                            continue
                        self._ask(batch, device)
                        bar.update(len(batch.natoms))
                        done += len(batch.natoms)
                        if bar.disable and self.part == 0 and time.monotonic() - told > _TELL:
                            told = time.monotonic()
                            _tell(done, self.asked, -(-total // self.parts), told - began)
        finally:
            self._writer.close()
            self.teacher.reader.refresh()

    def is_marked(self, source: Source) -> bool:
        """Whether the store is known to have all of a source; a marked one is not read again."""
        return is_marked(self.teacher.folder, self.teacher.names, source)

    def _own(self, groups: int) -> Iterator[int]:
        """This part's groups, from one that is drawn: jobs side by side begin at different ones."""
        own = range(self.part, groups, self.parts)
        first = random.SystemRandom().randrange(len(own)) if own else 0
        yield from (*own[first:], *own[:first])

    def _stopped(self) -> bool:
        if self.stop():
            self.ended = "it was asked to stop"
        return bool(self.ended)

    def _ask(self, batch: Batch, device: torch.device) -> None:
        teacher, now = self.teacher, time.monotonic()
        if now - self._looked > _LOOK:
            self._looked = now
            teacher.reader.refresh()
        structures, has = structures_of(batch), teacher.reader.has
        missing = [i for i, one in enumerate(structures) if not has(one.key(), teacher.names)]
        if not missing:
            return
        self.check(batch)
        sizes = [len(structures[i].numbers) for i in missing]
        edges = [round(teacher.edges_per_atom * size) for size in sizes]  # not known before asking
        size = sum(map(self._writer.size, sizes, edges))
        if size > self._left:
            self.ended = "it has reached task.distillation.teacher.max_gb"
            return
        said = teacher.live.teach(batch.to(device), teacher.requests)
        answers = by_structure(said, teacher.columns)
        edges = [self._writer.edges_of(answers[i]) for i in missing]
        size = sum(map(self._writer.size, sizes, edges))
        try:
            self._writer.append([(structures[i], answers[i]) for i in missing])
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
            self.ended = f"it cannot be written ({why})"
            return
        self._left -= size
        self.asked += len(batch.natoms)


def is_marked(folder: Path, columns: Sequence[str], source: Source) -> bool:
    """Whether a store is known to have these columns of all of a source."""
    return source.mark is not None and any(
        mark.get("source") == source.mark and set(columns) <= set(mark.get("columns", []))
        for mark in marks(folder)
    )


def note_filled(folder: Path, columns: Sequence[str], sources: Sequence[Source]) -> None:
    """Note that a store has all of these; for one process, when all parts have ended so."""
    lines = [
        json.dumps({"source": source.mark, "columns": list(columns)}) + "\n"
        for source in sources
        if source.mark is not None and not is_marked(folder, columns, source)
    ]
    try:
        with (folder / "filled.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        logging.debug(f"the store could not be marked ({error}); it will be looked through")


def dataset_mark(settings: Any, dataset: Any, more: str = "") -> str | None:
    """A digest of a data set's config and files, by their sizes and times; None where unknown.

    A store that was filled from it need not be looked through again as long as this is the same.
    Should it be the same although a structure has changed, the structure's key has changed too, so
    that nothing wrong is read: the teacher is asked.
    """
    sources = settings.get("src")
    told = [json.dumps(settings, sort_keys=True, default=str), str(len(dataset)), more]
    for source in [sources] if isinstance(sources, (str, os.PathLike)) else (sources or []):
        path = Path(source)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.suffix == ".lock" or file.name.endswith("-lock"):
                continue
            try:
                state = file.stat()
            except OSError:
                return None
            told.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(told).encode()).hexdigest() if sources else None


def _tell(done: int, asked: int, total: int, seconds: float) -> None:
    """How far it is: of what is left the teacher may have spoken too, which takes no time."""
    line = f"{done} of {total} structures have the teacher's answers"
    if asked:
        rate, most = asked / seconds, "at most " if asked < done else ""
        left = (total - done) / rate / 60
        line += f", {asked} were asked for now ({rate:.0f}/s, {most}{left:.1f} min left)"
    logging.info(line)
