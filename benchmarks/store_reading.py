"""A store of 100,000 structures: how long it takes to open, what it holds in memory, how it reads.

    python benchmarks/store_reading.py

The store is made here by the writer, which needs no teacher: 8 to 16 atoms, energy, forces and a
feature of 128 channels. Everything is measured in processes of its own; structures are read whole,
in an order that is drawn, as a shuffled training does. Rates by the clock depend on what else the
machine does; those by processor time, of one process, do not.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fairchem_kd.store import Column, Reader, Structure, Writer

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = [
    Column("output:energy", "structure", (1,), "<f8"),
    Column("output:forces", "atom", (3,), "<f8"),
    Column("feature:node:node", "atom", (128,), "<f4"),
]
NAMES = [column.name for column in COLUMNS]
SHARDS = 4
GROUP = 32


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--structures", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/store_reading")
    args = parser.parse_args()
    rows = []
    for number in args.structures:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), number))
        print(rows[-1], flush=True)
    write(rows, args.out)


def measure(folder: Path, structures: int) -> dict[str, float]:
    """One row: a store of so many structures."""
    fill(folder, structures)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {"structures": structures, "size_mb": size / 1e6, **alone(open_and_read, folder)}
    for processes in (1, 4):
        by_clock, by_processor = read_by(processes, folder)
        row |= {f"by_{processes}_per_s": by_clock, f"by_{processes}_per_cpu_s": by_processor}
    return row


def fill(folder: Path, structures: int) -> None:
    """Write a store, in groups and shards as fillings do."""
    draw = np.random.default_rng(0)
    writers = [Writer(folder, COLUMNS) for _ in range(SHARDS)]
    for start in range(0, structures, GROUP):
        records = []
        for _ in range(start, min(start + GROUP, structures)):
            atoms = int(draw.integers(8, 17))
            structure = Structure(
                draw.integers(1, 90, atoms), draw.normal(size=(atoms, 3)), np.eye(3) * 20
            )
            values = {
                "output:energy": draw.normal(size=1),
                "output:forces": draw.normal(size=(atoms, 3)),
                "feature:node:node": draw.standard_normal((atoms, 128), np.float32),
            }
            records.append((structure, values))
        writers[start // GROUP % SHARDS].append(records)
    for writer in writers:
        writer.close()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def open_and_read(folder: Path) -> dict[str, float]:
    """Opening a store, and reading all of it once, with what the process holds then."""
    Reader(folder).close()  # imports, and the directory's entries
    before = resident()
    reader = Reader(folder)
    after_opening = resident() - before
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        Reader(folder)
        taken.append(time.perf_counter() - began)
    keys = shuffled(reader)
    held = resident()
    for key in keys:
        assert reader.read(key, NAMES) is not None
    return {
        "open_ms": 1e3 * median(taken),
        "open_mb": after_opening,
        "read_all_mb": resident() - held,
    }


def shuffled(reader: Reader) -> list[bytes]:
    keys = [key.tobytes() for shard in reader.shards for key in shard.entries["key"]]
    random.Random(0).shuffle(keys)
    return keys


def read_by(processes: int, folder: Path) -> tuple[float, float]:
    """Structures that several processes with a share each read: a second of the clock, and a
    second of the processor time of one of them."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(processes), context.Queue()
    children = [
        context.Process(target=read_share, args=(folder, part, processes, ready, told))
        for part in range(processes)
    ]
    for child in children:
        child.start()
    found = [told.get() for _ in children]
    for child in children:
        child.join()
    number = sum(count for count, *_ in found)
    clock = max(ended for *_, ended in found) - min(began for _, _, began, _ in found)
    return number / clock, number / sum(cpu for _, cpu, *_ in found)


def read_share(folder: Path, part: int, parts: int, ready: Any, told: Any) -> None:
    """Open the store, wait for the others, and read; tells how many in which time."""
    reader = Reader(folder)
    keys = shuffled(reader)[part::parts]
    ready.wait()
    began, cpu = time.perf_counter(), time.process_time()
    for key in keys:
        assert reader.read(key, NAMES) is not None
    told.put((len(keys), time.process_time() - cpu, began, time.perf_counter()))


def resident() -> float:
    """MB of memory that this process holds, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write(rows: list[dict[str, float]], out: Path) -> None:
    """The table, as CSV and Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 2) for k, v in row.items()} for row in rows)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}"
    heads = {
        "structures": "structures",
        "size_mb": "MB",
        "open_ms": "opening, ms",
        "open_mb": "memory once open, MB",
        "read_all_mb": "more after reading all, MB",
        "by_1_per_s": "read a second",
        "by_4_per_s": "by 4 processes",
        "by_1_per_cpu_s": "read a processor second",
        "by_4_per_cpu_s": "by each of 4",
    }
    lines = [
        f"{machine}.",
        "",
        "| " + " | ".join(heads.values()) + " |",
        "|" + " ---: |" * len(heads),
    ]
    for row in rows:
        cells = [f"{row[k]:,.0f}" if row[k] >= 20 else f"{row[k]:.1f}" for k in heads]
        lines.append("| " + " | ".join(cells) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
