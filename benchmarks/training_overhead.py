"""What distilling costs a training step: plain, with a live teacher, and with a stored one.

    OMP_NUM_THREADS=1 python benchmarks/training_overhead.py

Each row is one way of training one pair of models, without and with rattled copies, on data that
are made here in seconds. Steps of all ways are taken in turn, in an order that is drawn anew every
time, and batches are read as in a training, so that ratios hold on a machine with other work. Each
timed step follows one of the same way that is not timed, as steps follow each other in a training:
right after a large model's step a small one's finds none of its code and weights in the caches.
Ratios and goals go by the processor time of this one process with one thread, which other work
stretches less than the clock.

"structures" is how many a step runs the student on; a plain step with as many is the yardstick of
a step with copies. "peak" is the memory that a step takes beyond what was held before it: in
steps of their own free memory is given back first, Linux's high-water mark is set to what is left,
and the largest growth counts; weights, of the teacher too, are not in it. The last two columns are
what filling the store costs for each structure, and after how many epochs it has paid.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import gc
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.stock.noise import drop_noise, quiet
from fairchem_kd.stock.trainer import in_one_process
from fairchem_kd.teachers import LiveTeacher
from fairchem_kd.teachers.filling import Filling

ROOT = Path(__file__).resolve().parents[1]
LOSSES: dict[str, Any] = {"e2n": {}, "vanilla": {}}
PAIRS = {
    "GemNet-OC -> PaiNN-small": ("gemnet_oc_slabs.pt", "painn_small.yml", LOSSES),
    "GemNet-OC -> SchNet": ("gemnet_oc_slabs.pt", "schnet_small.yml", LOSSES),
    "PaiNN -> PaiNN-small": ("painn_collisions.pt", "painn_small.yml", {"n2n": {}, "vanilla": {}}),
}
BATCH = 8


PLAIN, LIVE, STORED = "plain", "live", "stored"
NO_GRAD = "live, no_grad"  # in place of inference mode
FEATURES = "live, features alone"  # without a loss on outputs: the forward is left early
WHOLE = "live, features alone, whole forward"
TEACHER = "(the teacher's bare forward)"
WARM_UP = 2  # steps that are not timed
AT_LEAST = 5  # that are
OF_MEMORY = 3  # steps of which memory is measured, and not time: giving it back costs time


@dataclass
class Row:
    """One way of training one pair."""

    pair: str
    way: str
    structures: int  #: that the student is run on in a step
    ms: float  #: of a step by the clock, median
    cpu_ms: float  #: of a step by processor time, median
    ratio: float  #: to a plain step with as many structures: median of ratios taken in turn
    peak_mb: float  #: that a step takes beyond what was held before it, largest
    fill_ms: float  #: processor time of asking and keeping, per structure
    break_even: float  #: epochs after which filling has paid, against the live teacher


@dataclass
class Goals:
    """Medians of ratios by processor time, without copies."""

    pair: str
    stored: float  #: to a plain step
    live: float  #: to a plain step and the teacher's bare forward
    first_epoch: float  #: of a store, asking included, to live
    inference_mode: float  #: live, to live under no_grad
    early_stop: float  #: features alone, to the same with the whole forward


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=40.0,
        help="processor time of the timed steps of a pair, for each half of its rows (40)",
    )  # fmt: skip
    parser.add_argument("--train", type=int, default=96, help="structures (96)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_overhead")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    args = parser.parse_args()
    drop_noise()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    goals: list[Goals] = []
    with tempfile.TemporaryDirectory() as folder:
        data = {"slabs": Path(folder) / "slabs", "collisions": Path(folder) / "collisions"}
        for pair in args.pairs:
            recipe = "collisions" if "collisions" in PAIRS[pair][0] else "slabs"
            if not data[recipe].exists():
                _make(recipe, data[recipe], args.train)
            found, reached = measure(pair, data[recipe], Path(folder), args.seconds)
            rows += found
            goals.append(reached)
    _write(rows, goals, args.out)


def _make(recipe: str, dest: Path, train: int) -> None:
    code = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
    words = ["data", recipe, "--dest", str(dest), "--train", str(train)]
    words += ["--val", "8", "--test", "8", "--ood", "8"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def measure(pair: str, data: Path, scratch: Path, seconds: float) -> tuple[list[Row], Goals]:
    """The rows of one pair, and how it does by the goals."""
    rows: list[Row] = []
    for copies in (0.0, 0.5):
        own = PAIRS[pair][2]
        together = BATCH + round(copies * BATCH)
        ways = {
            PLAIN: _trainer(pair, data, scratch, batch=together, losses=None),
            LIVE: _trainer(pair, data, scratch, copies=copies),
            STORED: _trainer(pair, data, scratch, copies=copies, store="store"),
        }
        if not copies:
            features = {name: options for name, options in own.items() if name != "vanilla"}
            ways[NO_GRAD] = _trainer(pair, data, scratch)
            ways[FEATURES] = _trainer(pair, data, scratch, losses=features)
            ways[WHOLE] = _trainer(pair, data, scratch, losses=features)
        fill = 0.0
        for way, trainer in ways.items():
            live = trainer.make_distillation()
            if live is None:
                continue
            if way == NO_GRAD:
                live._mode = torch.no_grad
            if way == WHOLE:
                live.teach = _with_outputs(live)
            if way == STORED:
                # read, as the other ways' first epoch does, and both models warm
                samples = [trainer.train_samples[i] for i in range(len(trainer.train_dataset))]
                live.teach(trainer.collater(samples), trainer.distillation.teacher_requests)
                trainer.distillation_config.teacher.store = str(scratch / f"store-{time.time_ns()}")
                fill = _filled(trainer, live)
            trainer.distillation.fit_statistics(trainer.train_dataset, trainer.collater)
        taken = _in_turn(ways, seconds)
        rows += _rows(pair, ways, taken, together, fill, copies)
        for row in rows[-len(taken) :]:
            told = f"{row.cpu_ms:8.1f} ms  x {row.ratio:5.2f}  {row.peak_mb:6.0f} MB"
            print(f"{pair:<26} {row.way:<36} {told}", flush=True)
        if not copies:
            goals = _goals(pair, taken, fill)
    return rows, goals


def _goals(pair: str, taken: dict[str, Taken], fill: float) -> Goals:
    cpu = {way: one.cpu for way, one in taken.items()}
    bare = [a + b for a, b in zip(cpu[PLAIN], cpu[TEACHER], strict=True)]
    first = [BATCH * fill + stored for stored in cpu[STORED]]
    return Goals(
        pair,
        _ratio(cpu[STORED], cpu[PLAIN]),
        _ratio(cpu[LIVE], bare),
        _ratio(first, cpu[LIVE]),
        _ratio(cpu[LIVE], cpu[NO_GRAD]),
        _ratio(cpu[FEATURES], cpu[WHOLE]),
    )


def _ratio(one: list[float], other: list[float]) -> float:
    """The median of ratios of what was taken in turn."""
    return median(a / b for a, b in zip(one, other, strict=True))


def _with_outputs(live: LiveTeacher) -> Callable[..., Any]:
    teach = live.teach
    return lambda batch, requests, outputs=True: teach(batch, requests)


def _filled(trainer: DistillationTrainer, live: LiveTeacher) -> float:
    """Seconds of processor time for each structure that the teacher was asked about.

    Of asking and keeping alone: what is measured once for a new store does not grow with it.
    """
    spent: list[tuple[float, int]] = []
    fill = Filling.fill

    def timed(self: Filling, *args: Any) -> None:
        began = time.process_time()
        fill(self, *args)
        spent.append((time.process_time() - began, self.asked))

    Filling.fill = timed  # type: ignore[method-assign]
    try:
        trainer.keep_answers(live)
    finally:
        Filling.fill = fill  # type: ignore[method-assign]
    [(seconds, asked)] = spent
    return seconds / asked


@dataclass
class Taken:
    """What the steps of one way took."""

    clock: list[float]  #: s
    cpu: list[float]  #: s
    peak: float = 0.0  #: MB


def _in_turn(ways: dict[str, DistillationTrainer], seconds: float) -> dict[str, Taken]:
    """Steps of every way, and the teacher's bare forward, one after the other."""
    streams = {way: _batches(trainer) for way, trainer in ways.items()}
    taken = {way: Taken([], []) for way in (*ways, TEACHER)}
    model = ways[LIVE].distillation.teacher.frozen.model
    bare = _batches(ways[PLAIN])

    def step(way: str, turn: int, batch: Any) -> None:
        if way == TEACHER:
            with torch.no_grad():
                model(copy.copy(batch))
            return
        trainer = ways[way]
        trainer.step = turn + 1
        trainer.take_step(next(streams[way]))

    def measured(way: str, turn: int, batch: Any) -> tuple[float, float]:
        clock, cpu = time.perf_counter(), time.process_time()
        step(way, turn, batch)
        return time.perf_counter() - clock, time.process_time() - cpu

    order, draw = list(taken), random.Random(0)
    turn, spent = 0, 0.0
    while turn < WARM_UP + AT_LEAST or spent < seconds:
        batch = next(bare)
        draw.shuffle(order)
        for way in order:
            step(way, turn, batch)
            clock, cpu = measured(way, turn, batch)
            if turn >= WARM_UP:
                taken[way].clock.append(clock)
                taken[way].cpu.append(cpu)
                spent += cpu
        turn += 1
    for more in range(OF_MEMORY):
        batch = next(bare)
        for way, one in taken.items():
            held = _let_go()
            step(way, turn + more, batch)
            one.peak = max(one.peak, _high_water() - held)
    return taken


def _rows(
    pair: str,
    ways: dict[str, DistillationTrainer],
    taken: dict[str, Taken],
    together: int,
    fill: float,
    copies: float,
) -> list[Row]:
    rows = []
    trainer = ways[LIVE]
    epoch = len(trainer.train_loader)
    gain = median(taken[LIVE].cpu) - median(taken[STORED].cpu)
    asked = len(trainer.train_dataset) * (1 + 8 * (copies > 0))
    for way, one in taken.items():
        stored = way == STORED
        rows.append(
            Row(
                pair,
                way + (" + copies" if copies else ""),
                together,
                1e3 * median(one.clock),
                1e3 * median(one.cpu),
                _ratio(one.cpu, taken[PLAIN].cpu),
                one.peak,
                1e3 * fill if stored else 0.0,
                fill * asked / (gain * epoch) if stored and gain > 0 else 0.0,
            )
        )
    return rows


def _let_go() -> float:
    """Give free memory back and forget the high-water mark; MB that are held after that."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _high_water()


def _high_water() -> float:
    """MB: the most that this process has held since it was last forgotten."""
    [line] = [
        s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024 / 1e6


def _batches(trainer: DistillationTrainer) -> Iterator[Any]:
    epoch = 0
    while True:
        trainer.train_sampler.set_epoch_and_start_iteration(epoch, 0)
        for batch in trainer.train_loader:
            if len(batch.natoms) == trainer.config["optim"]["batch_size"]:
                yield batch
        epoch += 1


def _trainer(
    pair: str,
    data: Path,
    scratch: Path,
    *,
    batch: int = BATCH,
    copies: float = 0.0,
    store: str = "off",
    losses: dict[str, Any] | None = LOSSES,
) -> DistillationTrainer:
    teacher, student, own = PAIRS[pair]
    mine = scratch / f"data-{time.time_ns()}"  # a process opens an LMDB once
    shutil.copytree(data / "train", mine)
    recipe = yaml.safe_load((ROOT / f"yaml_configs/data/{data.name}.yml").read_text())
    model = yaml.safe_load((ROOT / "yaml_configs/models" / student).read_text())["model"]
    distillation = {
        "teacher": {"checkpoint": str(ROOT / "checkpoints" / teacher), "store": store},
        "losses": own if losses is LOSSES else losses,
        "rattle": {"copies": copies} if copies else None,
        "statistics_samples": 32,
    }
    train = {**recipe["dataset"]["train"], "src": str(mine)}
    train.pop("build")
    config = {
        "task": {"distillation": distillation},
        "model": model,
        "outputs": recipe["outputs"],
        "optim": {
            "batch_size": batch, "num_workers": 0, "max_epochs": 100, "lr_initial": 1e-4,
            "optimizer": "AdamW", "scheduler": "Null", "clip_grad_norm": 10.0,
        },
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 5}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
        ],
        "evaluation_metrics": recipe["evaluation_metrics"],
    }  # fmt: skip
    with quiet():
        return in_one_process(
            DistillationTrainer, config, {"train": train}, identifier="overhead", seed=0
        )


def _write(rows: list[Row], goals: list[Goals], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 3) if isinstance(v, float) else v
                             for k, v in asdict(row).items()})  # fmt: skip
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    lines = [
        f"torch {torch.__version__}, {machine}, batches of {BATCH}; medians of steps in "
        "turn, ratios by processor time.",
        "",
        "| pair | way | structures | ms a step, processor | by the clock | to plain | peak, MB "
        "| filling, ms each | pays after epochs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        fill = f"{row.fill_ms:.1f} | {row.break_even:.1f}" if row.fill_ms else " | "
        cells = f"{row.structures} | {row.cpu_ms:.1f} | {row.ms:.1f} | {row.ratio:.2f}"
        lines.append(f"| {row.pair} | {row.way} | {cells} | {row.peak_mb:.0f} | {fill} |")
    lines += [
        "",
        "| pair | stored to plain | live to plain and bare teacher | first epoch of a store to "
        "live | inference mode to no_grad | features alone, left early to whole |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in goals:
        _, *values = asdict(one).values()
        lines.append(f"| {one.pair} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _plot(rows, out.with_suffix(".png"))


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(row.pair for row in rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for panel, pair in zip(panels, pairs, strict=True):
        colors = {PLAIN: "0.6", LIVE: "C3", STORED: "C0", FEATURES: "C1"}
        mine = [r for r in rows if r.pair == pair and r.way.removesuffix(" + copies") in colors]
        panel.bar(
            range(len(mine)), [row.ratio for row in mine],
            color=[colors[row.way.removesuffix(" + copies")] for row in mine],
        )  # fmt: skip
        panel.axhline(1, color="k", linewidth=0.8)
        panel.set_xticks(range(len(mine)), [row.way for row in mine], rotation=60, ha="right")
        panel.set_title(pair, size=10)
    panels[0].set_ylabel("processor time of a step, to a\nplain one with as many structures")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
