"""What flushing denormal numbers does to plain fairchem training on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/flush_denormal.py

Takes training steps with stock fairchem's trainer, no distillation, with denormal numbers flushed
and not, and prints the median time of a step for each and their ratio. Every measurement is a
process of its own, since the flag belongs to threads from their start; the two of a pair take
turns, so that a machine whose speed changes slows both, and the ratio is the median of the pairs'.
Times are of the process's CPU where there is one thread, of the wall clock otherwise. Prints a
table, and writes it as NAME.csv and NAME.md into benchmarks/results/ (--out).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("painn_small", "painn_big", "schnet_small", "gemnet_oc_small")
WARM_UP = 3


@dataclass
class Row:
    """One model: milliseconds a step and their ratio, with its range over the pairs."""

    model: str
    data: str
    batch_size: int
    threads: int
    not_flushed_ms: float
    flushed_ms: float
    ratio: float
    lowest: float
    highest: float


def measure(model: str, data: str, batch_size: int, steps: int, flush: bool) -> float:
    """The median seconds of a step of stock's training, the loading of its batch left out."""
    import logging

    import torch
    import yaml

    torch.set_flush_denormal(flush)
    from fairchem.core.common.utils import setup_imports
    from fairchem.core.trainers import OCPTrainer

    setup_imports()
    logging.disable(logging.INFO)
    recipe = yaml.safe_load((ROOT / f"yaml_configs/data/{data}.yml").read_text())
    trainer = OCPTrainer(
        task={},
        model=yaml.safe_load((ROOT / f"yaml_configs/models/{model}.yml").read_text())["model"],
        outputs=recipe["outputs"],
        dataset={"train": recipe["dataset"]["train"]},
        optimizer={
            "batch_size": batch_size, "num_workers": 0, "max_epochs": 1, "lr_initial": 1e-3,
            "optimizer": "AdamW", "scheduler": "Null", "clip_grad_norm": 10,
            "ema_decay": 0.99,
        },
        loss_functions=[
            {"energy": {"fn": "mae", "coefficient": 5}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
        ],
        evaluation_metrics=recipe["evaluation_metrics"],
        identifier="flush_denormal", local_rank=0, is_debug=True, cpu=True, seed=0,
    )  # fmt: skip
    trainer.model.train()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    batches = iter(trainer.train_loader)
    for _ in range(WARM_UP + steps):
        batch = next(batches)
        start = clock()
        out = trainer._forward(batch)
        trainer._backward(trainer._compute_loss(out, batch))
        seconds.append(clock() - start)
    return statistics.median(seconds[WARM_UP:])


def in_a_process(task: dict[str, Any]) -> float:
    """`measure(**task)` in a process of its own; the last line that it prints is the result."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{task}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def compare(model: str, args: argparse.Namespace) -> Row:
    """Pairs of processes, their order turned around each time."""
    task = {"model": model, "data": args.data, "batch_size": args.batch_size, "steps": args.steps}
    pairs = []
    for number in range(args.pairs):
        order = (False, True) if number % 2 == 0 else (True, False)
        seconds = {flush: in_a_process({**task, "flush": flush}) for flush in order}
        pairs.append((seconds[False], seconds[True]))
    ratios = [plain / flushed for plain, flushed in pairs]
    plain, flushed = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    median = statistics.median(ratios)
    return Row(
        model, args.data, args.batch_size, threads, plain, flushed, median, min(ratios), max(ratios)
    )


def as_markdown(rows: list[Row]) -> str:
    """The table, with what it was measured on."""
    import torch

    lines = [
        f"{platform.machine()}, {_processor()}, torch {torch.__version__}",
        "",
        "| model | data | batch | threads | not flushed, ms | flushed, ms | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.model} | {r.data} | {r.batch_size} | {r.threads} | {r.not_flushed_ms:.0f} | "
        f"{r.flushed_ms:.0f} | {r.ratio:.2f} ({r.lowest:.2f} to {r.highest:.2f}) |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        names = [li for li in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in li]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="of yaml_configs/models")
    parser.add_argument("--data", default="slabs", help="of yaml_configs/data (default: slabs)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15, help="of each process")
    parser.add_argument("--pairs", type=int, default=3, help="of processes for each model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/flush_denormal")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(**json.loads(args.measure)))
        return
    rows = []
    for model in args.models:
        rows.append(compare(model, args))
        print(as_markdown(rows[-1:]).splitlines()[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    args.out.with_suffix(".md").write_text(as_markdown(rows))
    print("\n" + as_markdown(rows))


if __name__ == "__main__":
    main()
