"""What distilling costs a training step: plain, with a live teacher, and with a stored one.

    OMP_NUM_THREADS=1 python benchmarks/training_overhead.py

Each row is one pair of models, without and with rattled copies, on data that are made here in
seconds. Steps of all ways of training are taken in turn, batches being read as in a training, so
that ratios hold on a machine with other work beside it. "structures" is how many a step runs the
student on; a plain step with as many is the yardstick of a step with copies. The last two columns
are what filling the store costs for each structure, and after how many epochs it has paid.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.stock.noise import drop_noise, quiet
from fairchem_kd.stock.trainer import in_one_process
from fairchem_kd.teachers.stored import StoredTeacher

ROOT = Path(__file__).resolve().parents[1]
LOSSES: dict[str, Any] = {"e2n": {}, "vanilla": {}}
PAIRS = {
    "GemNet-OC -> PaiNN-small": ("gemnet_oc_slabs.pt", "painn_small.yml", LOSSES),
    "GemNet-OC -> SchNet": ("gemnet_oc_slabs.pt", "schnet_small.yml", LOSSES),
    "PaiNN -> PaiNN-small": ("painn_collisions.pt", "painn_small.yml", {"n2n": {}, "vanilla": {}}),
}
BATCH = 8


@dataclass
class Row:
    """One way of training one pair."""

    pair: str
    way: str
    structures: int  #: that the student is run on in a step
    ms: float  #: of a step, median
    ratio: float  #: to a plain step with as many structures, median of ratios taken in turn
    fill_ms: float  #: of the store, per structure
    break_even: float  #: epochs after which filling has paid, against the live teacher


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each way (15)")
    parser.add_argument("--train", type=int, default=96, help="structures (96)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_overhead")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    args = parser.parse_args()
    drop_noise()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = {"slabs": Path(folder) / "slabs", "collisions": Path(folder) / "collisions"}
        for pair in args.pairs:
            recipe = "collisions" if "collisions" in PAIRS[pair][0] else "slabs"
            if not data[recipe].exists():
                _make(recipe, data[recipe], args.train)
            rows += measure(pair, data[recipe], Path(folder), args.repeats)
    _write(rows, args.out)


def _make(recipe: str, dest: Path, train: int) -> None:
    code = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
    words = ["data", recipe, "--dest", str(dest), "--train", str(train)]
    words += ["--val", "8", "--test", "8", "--ood", "8"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def measure(pair: str, data: Path, scratch: Path, repeats: int) -> list[Row]:
    """The rows of one pair."""
    rows = []
    for copies in (0.0, 0.5):
        together = BATCH + round(copies * BATCH)
        ways = {
            "plain": _trainer(pair, data, scratch, batch=together, losses=None),
            "live": _trainer(pair, data, scratch, copies=copies, store="off"),
            "stored": _trainer(pair, data, scratch, copies=copies, store="store"),
        }
        fill = 0.0
        for way, trainer in ways.items():
            live = trainer.make_distillation()
            if live is None:
                continue
            if way == "stored":
                trainer.distillation_config.teacher.store = str(scratch / f"store-{time.time_ns()}")
                began = time.perf_counter()
                trainer.keep_answers(live)
                kept = trainer.distillation.teacher
                assert isinstance(kept, StoredTeacher)
                fill = (time.perf_counter() - began) / max(len(kept.reader), 1)
            trainer.distillation.fit_statistics(trainer.train_dataset, trainer.collater)
        streams = {way: _batches(trainer) for way, trainer in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(repeats + 2):
            for way, trainer in ways.items():
                began = time.perf_counter()
                trainer.step = turn + 1
                trainer.take_step(next(streams[way]))
                if turn >= 2:
                    seconds[way].append(time.perf_counter() - began)
        plain = seconds["plain"]
        epoch = len(ways["live"].train_loader)
        for way, taken in seconds.items():
            ratio = median(a / b for a, b in zip(taken, plain, strict=True))
            stored = way == "stored"
            gain = median(seconds["live"]) - median(seconds["stored"])
            asked = len(ways["live"].train_dataset) * (1 + 8 * (copies > 0))
            rows.append(
                Row(
                    pair,
                    way + (" + copies" if copies else ""),
                    together,
                    1e3 * median(taken),
                    ratio,
                    1e3 * fill if stored else 0.0,
                    fill * asked / (gain * epoch) if stored and gain > 0 else 0.0,
                )
            )
            print(
                f"{pair:<26} {rows[-1].way:<16} {rows[-1].ms:8.1f} ms  x {ratio:5.2f}", flush=True
            )
    return rows


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
        "losses": own if losses is not None else None,
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


def _write(rows: list[Row], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 3) if isinstance(v, float) else v
                             for k, v in asdict(row).items()})  # fmt: skip
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    lines = [
        f"torch {torch.__version__}, {machine}, batches of {BATCH}; medians of steps in turn.",
        "",
        "| pair | way | structures | ms a step | to plain | filling, ms each | pays after epochs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        fill = f"{row.fill_ms:.1f} | {row.break_even:.1f}" if row.fill_ms else " | "
        cells = f"{row.structures} | {row.ms:.1f} | {row.ratio:.2f}"
        lines.append(f"| {row.pair} | {row.way} | {cells} | {fill} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _plot(rows, out.with_suffix(".png"))


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(row.pair for row in rows))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for panel, pair in zip(panels, pairs, strict=True):
        mine = [row for row in rows if row.pair == pair]
        colors = {"plain": "0.6", "live": "C3", "stored": "C0"}
        panel.bar(
            range(len(mine)), [row.ratio for row in mine],
            color=[colors[row.way.split(" ")[0]] for row in mine],
        )  # fmt: skip
        panel.axhline(1, color="k", linewidth=0.8)
        panel.set_xticks(range(len(mine)), [row.way for row in mine], rotation=40, ha="right")
        panel.set_title(pair, size=10)
    panels[0].set_ylabel("step time, to a plain one\nwith as many structures")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
