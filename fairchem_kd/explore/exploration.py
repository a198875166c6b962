"""Exploring: group by group, each in a file, and a data set of all of them in the end.

A group is a few structures of one source, one after the other; what comes of it depends on them,
the settings and the models alone, not on the number of processes nor on interruptions. So an
exploration that was killed goes on with the groups that have no file, and ends as it would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lmdb

from fairchem_kd._version import __version__
from fairchem_kd.data.card import read_card
from fairchem_kd.data.create import locked, what_failed
from fairchem_kd.data.replace import check_replaceable, put_in_place
from fairchem_kd.data.workers import Progress
from fairchem_kd.errors import UserError
from fairchem_kd.explore.answers import Answers
from fairchem_kd.explore.assembling import NothingKept, assemble
from fairchem_kd.explore.driving import teacher_dynamics
from fairchem_kd.explore.following import find_window, student_dynamics
from fairchem_kd.explore.group_file import read_group, write_group
from fairchem_kd.explore.potentials import Potential
from fairchem_kd.explore.rattling import rattle
from fairchem_kd.explore.relaxing import relax
from fairchem_kd.explore.settings import MD, RATTLE, RELAX, STUDENT, Group, Settings, Window
from fairchem_kd.explore.starts import Source, Start, beside, elements_of, read_starts, told_apart
from fairchem_kd.files import write_text
from fairchem_kd.reading import read_json

#: Of the hidden folder; another one is begun anew.
_LAYOUT = 2
_MARK = "options.json"
_WINDOW_OF = 64  # structures that say where a window begins

#: Runs the other processes' parts, of so many.
RunParts = Callable[[int], None]
#: Takes the folder in which a data set is made, its card, and what was said of its frames.
Keep = Callable[[Path, dict[str, Any], Answers], Any]


@dataclass(frozen=True)
class Plan:
    """What is explored, with what.

    ``told`` says which teacher and student these are, for the card; with another one an exploration
    that was cut off is begun anew.
    """

    sources: Sequence[Source]
    settings: Settings
    teacher: Potential | None = None
    student: Potential | None = None
    limit: int | None = None  #: structures of each source, at most
    told: Mapping[str, Any] = field(default_factory=dict)
    #: with whose structures nothing may be alike, beside the tests beside the sources
    apart_from: Sequence[Source] = ()
    #: what was found before, of which nothing is taken again
    known: Sequence[Source] = ()


def explore(
    plan: Plan,
    dest: Path,
    *,
    force: bool = False,
    processes: int = 1,
    run_parts: RunParts | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Write the data set ``dest`` and return its card; or that of this very one where it is there.

    Args:
        plan: what to explore.
        dest: the folder of the data set.
        force: replace a data set that is there; nothing else is ever deleted.
        processes: how many share the work; more than one with ``run_parts`` alone.
        run_parts: starts :func:`explore_part` in other processes and waits for them.
        keep: keeps what the teacher said elsewhere, before the data set is in its place; if it
            fails, the same exploration goes on with it.

    Raises:
        UserError: structures, models or a destination that will not do.
        NothingKept: no structure is left; what was found so far is kept no longer.
    """
    dest = Path(os.path.abspath(dest))
    _refuse_sources_in(dest, plan)
    with locked(dest):
        if dest.exists() and not force:
            card = read_card(dest)
            if card is None or _digest_in(card) != _digest(plan):
                raise UserError(
                    f"{dest} exists; give --force to replace it, or name another folder."
                )
            return card
        check_replaceable(dest)
        groups = _groups(plan)
        work = _work(dest)
        try:
            settings = _prepare(work, plan, groups)
            if processes > 1 and run_parts is not None:
                run_parts(processes)
            _do(work, groups, plan, settings, range(len(groups)), quiet=False)
            card = _assemble(work, groups, plan, settings)
            if keep is not None:
                keep(work / "out", card, Answers(_files(work, groups), groups))
            put_in_place(work / "out", dest)
        except NothingKept:
            shutil.rmtree(work)
            raise
        except (OSError, lmdb.Error) as error:
            raise UserError(
                f"Cannot write {dest}: {what_failed(error)}; make room and start it again, and it "
                "goes on."
            ) from error
        shutil.rmtree(work)
    return card


def explore_part(plan: Plan, dest: Path, part: tuple[int, int]) -> None:
    """Do the groups of one part; who explores without parts puts them together.

    Raises:
        UserError: see :func:`explore`.
    """
    dest = Path(os.path.abspath(dest))
    number, parts = part
    groups = _groups(plan)
    work = _work(dest)
    settings = _prepare(work, plan, groups)
    _do(work, groups, plan, settings, range(number, len(groups), parts), quiet=number > 0)


def _work(dest: Path) -> Path:
    return dest.parent / f".{dest.name}.exploring"


def _refuse_sources_in(dest: Path, plan: Plan) -> None:
    for source in plan.sources:
        path = source.path.absolute()
        if dest in (path, *path.parents):
            raise UserError(f"{dest} holds the source {source.path}; name another folder.")


def _groups(plan: Plan) -> list[list[Start]]:
    """The structures, a few at a time, in order.

    Raises:
        UserError: they cannot be read, or a model does not know their elements.
    """
    groups = []
    size = max(plan.settings.batch, 1)
    held = [list(read_starts(source, plan.limit)) for source in plan.sources]
    for starts in told_apart(plan.sources, held):
        for model in (plan.teacher, plan.student):
            if model is not None:
                model.check_elements(elements_of(starts))
        groups += [starts[at : at + size] for at in range(0, len(starts), size)]
    return groups


def _prepare(work: Path, plan: Plan, groups: Sequence[Sequence[Start]]) -> Settings:
    """A folder for this very exploration, and the settings with their window.

    Raises:
        UserError: the folder is something else, or no window can be found.
    """
    mark = work / _MARK
    if work.exists() and not mark.is_file() and any(work.iterdir()):
        raise UserError(
            f"{work} is in the way and was not made by an exploration; move it away, or name "
            "another folder for the data set."
        )
    wanted = _digest(plan)
    there = _read_mark(mark)
    if there is None or there.get("wanted") != wanted:
        if there is not None:
            print(
                f"note: {work} is of an exploration with other options, or of sources that have "
                "changed since: begun anew.",
                file=sys.stderr,
            )
        shutil.rmtree(work, ignore_errors=True)
        settings = _with_window(plan, groups)
        window = None if settings.window is None else [settings.window.low, settings.window.high]
        write_text(mark, json.dumps({"wanted": wanted, "window": window}))
        return settings
    if there["window"] is None:
        return plan.settings
    return replace(plan.settings, window=Window(*there["window"]))


def _read_mark(mark: Path) -> dict[str, Any] | None:
    try:
        return read_json(mark)
    except (OSError, ValueError):
        return None


def _digest(plan: Plan) -> str:
    """Of all that decides what comes out; of files, how large they are and when written."""
    files = []
    for source in (*plan.sources, *plan.apart_from, *plan.known):
        path = source.path.absolute()
        held = sorted(path.glob("*.lmdb")) if path.is_dir() else [path]
        stats = [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in held]
        files.append([source.split, stats])
    told = [__version__, _LAYOUT, plan.settings.as_dict(), plan.limit, files, dict(plan.told)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest_in(card: Mapping[str, Any]) -> Any:
    options = card.get("options")
    return options.get("digest") if isinstance(options, dict) else None


def _with_window(plan: Plan, groups: Sequence[Sequence[Start]]) -> Settings:
    """The settings; of a student's dynamics with a window, where none is given."""
    settings = plan.settings
    if settings.mode != STUDENT or settings.window is not None:
        return settings
    assert plan.student is not None
    assert plan.teacher is not None
    starts = [start for group in groups for start in group]
    number = min(_WINDOW_OF, len(starts))
    chosen = [starts[i * len(starts) // number] for i in range(number)]
    window = find_window(chosen, plan.student, plan.teacher)
    if window is None:
        raise UserError(
            f"Neither {plan.student.name} nor {plan.teacher.name} says anything of the same "
            "structure, so that there is nothing to compare: look at the structures, or give "
            "--window LOW HIGH."
        )
    return replace(settings, window=window)


def _do(
    work: Path,
    groups: Sequence[Sequence[Start]],
    plan: Plan,
    settings: Settings,
    numbers: Sequence[int],
    *,
    quiet: bool,
) -> None:
    """Do those of the groups that have no file."""
    missing = [number for number in numbers if not _is_done(_file(work, number))]
    total = sum(len(groups[number]) for number in numbers)
    progress = None if quiet else Progress("explore", total, unit="structure")
    if progress is not None and missing:
        progress.advance(total - sum(len(groups[number]) for number in missing))
    try:
        for number in missing:
            group = _make(groups[number], plan, settings)
            if not (work / _MARK).is_file():
                raise UserError(f"{work} was removed while it was filled: start it again.")
            write_group(_file(work, number), group)
            if progress is not None:
                progress.advance(len(groups[number]))
    finally:
        if progress is not None:
            progress.close()


def _file(work: Path, number: int) -> Path:
    return work / "groups" / f"{number:06d}.npz"


def _files(work: Path, groups: Sequence[Sequence[Start]]) -> list[Path]:
    return [_file(work, number) for number in range(len(groups))]


def _is_done(file: Path) -> bool:
    try:
        read_group(file)
    except (OSError, ValueError):
        return False
    return True


def _make(starts: Sequence[Start], plan: Plan, settings: Settings) -> Group:
    """What comes of some structures."""
    if settings.mode == RATTLE:
        return rattle(starts, settings, plan.teacher)
    assert plan.teacher is not None
    if settings.mode == RELAX:
        return relax(starts, settings, plan.teacher)
    if settings.mode == MD:
        return teacher_dynamics(starts, settings, plan.teacher)
    assert plan.student is not None
    return student_dynamics(starts, settings, plan.student, plan.teacher)


def _assemble(
    work: Path, groups: Sequence[Sequence[Start]], plan: Plan, settings: Settings
) -> dict[str, Any]:
    shutil.rmtree(work / "out", ignore_errors=True)
    told = {
        "sources": [str(source.path) for source in plan.sources],
        "limit": plan.limit,
        "digest": _digest(plan),
        **plan.told,
    }
    return assemble(
        work / "out",
        _files(work, groups),
        groups,
        settings,
        told,
        splits=[source.split for source in plan.sources],
        apart_from=[*plan.apart_from, *beside(plan.sources)],
        known=plan.known,
    )
