"""Converting files of labelled structures to a data set that fairchem trains on.

Each part of the sources is read by one worker, frame by frame, and written to shards in a hidden
folder beside the destination; what the worker counted goes beside its shards, and a mark says that
the part is complete. So memory does not grow with the data, and a conversion that was interrupted
goes on with the parts that are missing. When all are there, references are taken off, the whole is
checked, and the folder is renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import lmdb
import torch

from fairchem_kd._version import __version__
from fairchem_kd.data.convert.assemble import DONE, SPLITS, Conversion, assemble, part_folder
from fairchem_kd.data.convert.labels import ATOMIZATION, Labelled, Reading, label
from fairchem_kd.data.convert.shards import Shard, Tally
from fairchem_kd.data.convert.sources import (
    Part,
    find_files,
    parts_of,
    passed_over,
    read_part,
    split_of,
)
from fairchem_kd.data.create import locked, what_failed
from fairchem_kd.data.frames import Frame
from fairchem_kd.data.replace import check_replaceable, put_in_place
from fairchem_kd.data.workers import Progress, worker_pool
from fairchem_kd.data.writer import to_data
from fairchem_kd.errors import UserError
from fairchem_kd.files import write_text
from fairchem_kd.reading import read_json

#: Of the hidden folder; another one is begun anew.
_LAYOUT = 3


def split_for(group: str, seed: int, shares: tuple[float, ...]) -> str:
    """The split of a trajectory: a matter of its name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    for name, share in zip(SPLITS, shares, strict=False):
        draw -= share
        if draw < 0:
            return name
    return SPLITS[len(shares) - 1]


def plan(conversion: Conversion) -> list[Part]:
    """The parts of all sources, in order.

    Raises:
        UserError: no files, files that cannot be entered, or names that say the split of some only.
    """
    files = find_files(conversion.sources, conversion.pattern)
    _tell_passed_over(conversion.sources, files)
    if conversion.shares is not None:
        splits = [""] * len(files)
    elif conversion.into is not None:
        splits = [conversion.into] * len(files)
    else:
        splits = [split_of(file, conversion.sources) for file in files]
        if not any(splits):
            splits = ["train"] * len(files)
        if "" in splits:
            nameless = files[splits.index("")]
            raise UserError(
                f"The name of {nameless} says no split (train, val, test), but those of other "
                "files do: give --into for all, --split, or rename it."
            )
    parts = []
    for number, (file, split) in enumerate(zip(files, splits, strict=True)):
        parts += parts_of(file, number, split)
    if not parts:
        raise UserError(
            f"There are no frames in {', '.join(map(str, conversion.sources))}: every file is "
            "empty; name another folder or file."
        )
    return parts


def default_references(parts: list[Part]) -> str:
    """``oc20`` for its pairs, ``atomization`` where the first frame has that key, else ``fit``."""
    if parts[0].kind == "oc20":
        return "oc20"
    first = next(read_part(parts[0]), None)
    return "atomization" if first is not None and ATOMIZATION in first.atoms.info else "fit"


def default_group(parts: list[Part], split: bool) -> str:
    """What a trajectory is: OC20's system, a file of frames, or each frame by itself.

    Raises:
        UserError: frames are to be split, and what belongs together cannot be told.
    """
    kinds = {part.kind for part in parts}
    if kinds == {"oc20"}:
        return "system"
    if kinds <= {"trajectory", "ase"} and len({part.file for part in parts}) > 1:
        return "file"
    if split:
        raise UserError(
            "--split needs to know which frames belong to one trajectory, since neighbours in time "
            "must not be in two splits: give --group file, formula, frame (each by itself) or a "
            "key of the frames' info."
        )
    return "file" if kinds <= {"trajectory", "ase"} else "frame"


def convert(
    conversion: Conversion, dest: Path, processes: int, force: bool = False
) -> dict[str, Any]:
    """Write the data set ``dest`` and return its card.

    Args:
        conversion: what to convert.
        dest: the folder of the data set; its splits become folders inside.
        processes: how many workers.
        force: replace a data set that is there; nothing else is ever deleted.

    Raises:
        UserError: see the module; also when ``dest`` exists or cannot be written.
    """
    dest = Path(os.path.abspath(dest))
    for source in conversion.sources:
        if dest in (source.absolute(), *source.absolute().parents):
            raise UserError(f"{dest} holds the source {source}; name another folder.")
    with locked(dest) as descriptor:
        if dest.exists() and not force:
            raise UserError(f"{dest} exists; give --force to replace it, or name another folder.")
        check_replaceable(dest)
        parts = plan(conversion)
        work = dest.parent / f".{dest.name}.converting"
        _prepare(work, conversion)
        try:
            _convert_parts(work, parts, conversion, processes, descriptor)
            card = assemble(work, parts, conversion)
            put_in_place(work / "out", dest)
        except UserError:
            if not any(work.glob(f"parts/*/{DONE}")):  # there is nothing to go on with
                shutil.rmtree(work)
            raise
        except BrokenProcessPool as error:
            raise UserError(
                f"Cannot convert to {dest}: a worker process was killed, perhaps for want of "
                "memory; start it again with fewer --processes, and it goes on."
            ) from error
        except (OSError, lmdb.Error) as error:
            raise UserError(
                f"Cannot write {dest}: {what_failed(error)}; make room and start it again, and it "
                "goes on."
            ) from error
        shutil.rmtree(work)
    return card


def _prepare(work: Path, conversion: Conversion) -> None:
    """A folder for this very conversion: what another one left there is removed."""
    wanted = json.dumps([__version__, _LAYOUT, conversion.as_dict()], sort_keys=True)
    mark = work / "options.json"
    if work.exists() and not mark.is_file() and any(work.iterdir()):
        raise UserError(
            f"{work} is in the way and was not made by a conversion; move it away, or name another "
            "folder for the data set."
        )
    if work.exists() and (not mark.is_file() or mark.read_text("utf-8", "replace") != wanted):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_text(mark, wanted)


def _identity(part: Part) -> list[Any]:
    """What a complete part is complete of: the frames, of the file as it is."""
    stat = part.file.stat()
    place = [str(part.file), part.number, part.split, part.first, part.count, part.offset]
    return [*place, stat.st_size, stat.st_mtime_ns]


def _is_done(folder: Path, part: Part) -> bool:
    try:
        return read_json(folder / DONE)["part"] == _identity(part)
    except (OSError, ValueError, KeyError):
        return False


def _convert_parts(
    work: Path, parts: list[Part], conversion: Conversion, processes: int, descriptor: int
) -> None:
    """Convert the parts that are not complete yet."""
    missing = [n for n, part in enumerate(parts) if not _is_done(part_folder(work, n), part)]
    progress = Progress("convert", len(parts), unit="part")
    progress.advance(len(parts) - len(missing))
    if not missing:
        return progress.close()
    with worker_pool(processes, (descriptor,)) as pool:
        running: set[Future[None]] = set()
        try:
            for number in missing:
                running.add(
                    pool.submit(convert_part, parts[number], part_folder(work, number), conversion)
                )
                if len(running) >= 2 * processes:
                    running = _some_done(running, progress)
            while running:
                running = _some_done(running, progress)
        finally:
            for future in running:
                future.cancel()
            progress.close()


def _some_done(running: set[Future[None]], progress: Progress) -> set[Future[None]]:
    done, running = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    progress.advance(len(done))
    return running


def convert_part(part: Part, folder: Path, conversion: Conversion) -> None:
    """Write the shards and tallies of one part; the mark that it is complete comes last.

    Raises:
        UserError: the file, or labels of a frame, cannot be used.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    identity = _identity(part)
    shards: dict[str, Shard] = {}
    tallies: dict[str, Tally] = {}
    skipped: dict[str, Counter[str]] = {}
    pbc: set[tuple[bool, ...]] = set()
    partly = 0
    alone: list[str] = []
    try:
        for structure in read_part(part):
            found = label(structure, part, conversion.reading)
            if isinstance(found, str):
                name = part.split or "train"
                skipped.setdefault(name, Counter())[found] += 1
                continue
            name = part.split
            if conversion.shares is not None:
                name = split_for(found.group, conversion.seed, conversion.shares)
            if name not in shards:
                shards[name] = Shard(folder / f"{name}.lmdb")
                tallies[name] = Tally()
            shards[name].add(_sample(found, conversion.reading))
            tallies[name].add(
                found.frame.numbers, found.frame.fixed, found.forces, found.label,
                found.explained, found.sid, found.fid, _digest(found.frame),
            )  # fmt: skip
            pbc.add(found.pbc)
            partly += found.partly
            if found.alone:
                alone.append(f"{part.file}, frame {structure.frame}")
        for shard in shards.values():
            shard.close()
    except BaseException:
        for shard in shards.values():
            shard.abandon()
        raise
    for name, tally in tallies.items():
        tally.save(folder / f"{name}.npz")
    splits = {name: tally.summary() for name, tally in sorted(tallies.items())}
    done = {"part": identity, "skipped": skipped, "pbc": sorted(pbc), "partly": partly}
    done |= {"splits": splits, "alone": alone}
    write_text(folder / DONE, json.dumps(done))


def _tell_passed_over(sources: Sequence[Path], files: Sequence[Path]) -> None:
    """Name the files in folders that are not read: nobody should think that they were."""
    left = passed_over(sources, files)
    if left:
        kinds = Counter(_kind(file) for file in left)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
        print(
            f"note: passed over {len(left)} files ({told}{more}), the first {left[0]}; name what "
            "is to be read with --pattern.",
            file=sys.stderr,
        )


def _kind(file: Path) -> str:
    """``*.txt`` for one with a suffix, else its name."""
    return f"*{file.suffix}" if file.suffix else file.name


def _digest(frame: Frame) -> int:
    """64 bits out of elements, positions and cell: equal for a structure that occurs twice."""
    digest = hashlib.blake2b(frame.numbers.tobytes(), digest_size=8)
    digest.update(frame.pos.tobytes())
    digest.update(frame.cell.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _sample(found: Labelled, reading: Reading) -> Any:
    data = to_data(found.frame, found.label, found.sid, found.fid)
    data.pbc = torch.tensor([found.pbc])
    if reading.labels != "both":
        del data.forces
    if reading.labels == "none":
        del data.energy
    return data
