"""Distilling a property that is neither energy nor forces: the virial of strained metal slabs.

    OMP_NUM_THREADS=1 python benchmarks/other_targets.py

Everything is made here. The label is the trace of the virial in eV, minus the trace of the stress
times the volume, by ASE's EMT: a sum over atoms, like an energy. The models have one head, for it
alone. The teacher is trained on 1000 labels; the students have 30 of them. One learns from
those, for twice the steps, so that both see as many structures; the other learns from as many
labels and, with ``vanilla: {targets: [virial]}``, from the teacher's word on them and on the rest.
All through the commands, in three seeds; errors are of a test set that nobody has seen.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lmdb
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import add_adsorbate, fcc100, fcc111
from ase.calculators.emt import EMT
from torch_geometric.data import Data

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"labelled": 30, "unlabelled": 970, "val": 100, "test": 300}
BATCH = 10
SEEDS = (0, 1, 2)
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


@dataclass
class Row:
    """One training."""

    run: str
    seed: int
    labels: int
    structures: int  #: that the student is run on in the whole training
    mae: float  #: of the test set, eV
    seconds: float  #: of the command, start and evaluations included


# -- the data -------------------------------------------------------------------------------------


def slab(draw: np.random.Generator) -> Atoms:
    """A strained, rattled slab of 12 atoms, with or without an atom on it."""
    surface = (fcc111, fcc100)[draw.integers(2)]
    atoms = surface(str(draw.choice(METALS)), (2, 2, 3), vacuum=6.0)
    adsorbate = str(draw.choice(["", "H", "C", "N", "O"]))
    if adsorbate:
        add_adsorbate(atoms, adsorbate, height=draw.uniform(1.0, 1.6), position="bridge")
    atoms.pbc = True
    strain = np.diag([1 + draw.uniform(-0.04, 0.04), 1 + draw.uniform(-0.04, 0.04), 1.0])
    atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
    atoms.positions += draw.normal(0.0, 0.06, atoms.positions.shape)
    return atoms


def sample(atoms: Atoms, number: int) -> Data:
    """What fairchem reads, with ``virial`` as its only label."""
    pos = torch.tensor(atoms.positions, dtype=torch.float32)
    atoms.positions = pos.double().numpy()  # labels belong to what is stored
    atoms.calc = EMT()
    virial = -float(np.trace(atoms.get_stress(voigt=False)) * atoms.get_volume())
    return Data(
        pos=pos,
        cell=torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        atomic_numbers=torch.tensor(atoms.numbers),
        natoms=len(atoms),
        tags=torch.ones(len(atoms), dtype=torch.long),
        fixed=torch.zeros(len(atoms)),
        virial=virial,
        sid=number,
        fid=0,
    )


def write(folder: Path, samples: list[Data]) -> None:
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=2**28)
    with environment.begin(write=True) as transaction:
        for number, one in enumerate(samples):
            transaction.put(str(number).encode(), pickle.dumps(one, protocol=4))
        transaction.put(b"length", pickle.dumps(len(samples), protocol=4))
    environment.close()
    np.savez(folder / "metadata.npz", natoms=[one.natoms for one in samples])


def make_data(root: Path) -> dict[str, dict[str, float]]:
    """Every split, and ``train`` for the teacher; returns the normalisers of both."""
    draw = np.random.default_rng(0)
    made = {
        name: [sample(slab(draw), number) for number in range(count)]
        for name, count in SIZES.items()
    }
    made["train"] = made["labelled"] + made["unlabelled"]
    for name, samples in made.items():
        write(root / "data" / name, samples)
    norms = {}
    for name, count in (("train", 100), ("labelled", SIZES["labelled"])):
        labels = np.array([one.virial for one in made[name][:count]])
        norms[name] = {"mean": float(labels.mean()), "rmsd": float(labels.std())}
    return norms


# -- the configs ----------------------------------------------------------------------------------


def config(
    split: str, norms: dict[str, Any], hidden: int, layers: int, cutoff: float, steps: int
) -> dict[str, Any]:
    """A config for stock fairchem: PaiNN with one head, for the virial."""
    size = SIZES["labelled"] + (SIZES["unlabelled"] if split == "train" else 0)
    epochs = max(1, round(steps * BATCH / size))
    return {
        "trainer": "ocp",
        "logger": "tensorboard",
        "model": {
            "name": "hydra",
            "backbone": {
                "model": "painn_backbone",
                "hidden_channels": hidden,
                "num_layers": layers,
                "num_rbf": 24,
                "cutoff": cutoff,
                "max_neighbors": 60,
                "use_pbc": True,
                "otf_graph": True,
                "regress_forces": False,
                "direct_forces": True,
            },
            "heads": {"virial": {"module": "painn_energy_head"}},
        },
        "outputs": {"virial": {"level": "system", "property": "energy"}},
        "loss_functions": [{"virial": {"fn": "mae", "coefficient": 1}}],
        "evaluation_metrics": {"metrics": {"virial": ["mae"]}, "primary_metric": "virial_mae"},
        "dataset": {
            "train": {
                "format": "lmdb",
                "src": f"data/{split}",
                "transforms": {"normalizer": {"virial": norms[split]}},
            },
            "val": {"format": "lmdb", "src": "data/val"},
        },
        "optim": {
            "batch_size": BATCH,
            "eval_batch_size": 50,
            "num_workers": 0,
            "max_epochs": epochs,
            "eval_every": max(1, steps // (8 if split == "train" else 6)),
            "lr_initial": 1e-3,
            "optimizer": "AdamW",
            "optimizer_params": {"amsgrad": True, "weight_decay": 0.0},
            "scheduler": "CosineAnnealingLR",
            "T_max": steps,
            "eta_min": 1e-6,
            "ema_decay": 0.99,
            "clip_grad_norm": 10.0,
        },
    }


def distilled(plain: dict[str, Any]) -> dict[str, Any]:
    """The same training with the teacher's word on as many structures without labels again."""
    dataset = {"format": "lmdb", "src": "data/unlabelled"}
    block = {
        "teacher": {"checkpoint": "teacher.pt"},
        "losses": {"vanilla": {"targets": ["virial"]}},
        "unlabelled": {"dataset": dataset, "share": 0.5},
    }
    return {**plain, "trainer": "fairchem_kd.DistillationTrainer", "task": {"distillation": block}}


# -- the runs -------------------------------------------------------------------------------------


def command(root: Path, script: str, *argv: str) -> float:
    """Run ``fairchem`` or ``fairchem-kd`` in ``root``; returns the seconds that it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).with_name(script), *argv],
        cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(RESULTS.parents[1])},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def train(root: Path, name: str, contents: dict[str, Any], seed: int) -> tuple[Path, float]:
    """Train through the command; returns the best checkpoint, and how long it took."""
    path, identifier = root / f"{name}.yml", f"{name}-{seed}"
    path.write_text(yaml.safe_dump(contents))
    seconds = command(
        root, "fairchem", "main", "--mode", "train", "--config-yml", path.name, "--cpu",
        "--seed", str(seed), "--identifier", identifier, "--run-dir", str(root),
    )  # fmt: skip
    (folder,) = (root / "checkpoints").glob(f"*[0-9]-{identifier}")  # after a timestamp
    return folder / "best_checkpoint.pt", seconds


def with_scales(root: Path, name: str, contents: dict[str, Any]) -> dict[str, Any]:
    """The config with PaiNN's scale factors, fitted on its training set."""
    path = root / f"{name}_unscaled.yml"
    path.write_text(yaml.safe_dump(contents))
    out = f"{name}.json"
    if not (root / out).is_file():
        argv = ("fit-scales", "--config-yml", path.name, "--out", out, "--cpu")
        command(root, "fairchem-kd", *argv)
    contents["model"]["backbone"]["scale_file"] = out
    return contents


def test_error(checkpoint: Path, root: Path) -> float:
    """The MAE of a model on the test set, eV."""
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.stock.datasets import collate, open_in_order

    model = Teacher.from_checkpoint(checkpoint, elements=[*METALS, "H", "C", "N", "O"])
    dataset = open_in_order({"format": "lmdb", "src": str(root / "data/test")}, "test")
    errors: list[float] = []
    for start in range(0, len(dataset), 50):
        batch = collate([dataset[i] for i in range(start, min(start + 50, len(dataset)))])
        said = model.denormalized(model.forward(batch), batch)["virial"]
        errors += (said - batch.virial).abs().tolist()
    return mean(errors)


def measure(root: Path, teacher_steps: int, steps: int, seeds: list[int]) -> list[Row]:
    known = root / "normalizer.json"
    if not known.is_file():  # of an earlier go in this folder
        known.write_text(json.dumps(make_data(root)))
    norms = json.loads(known.read_text())
    big = with_scales(root, "teacher", config("train", norms, 64, 3, 5.0, teacher_steps))
    small = with_scales(root, "student", config("labelled", norms, 32, 2, 4.0, steps))
    longer = config("labelled", norms, 32, 2, 4.0, 2 * steps)
    longer["model"] = small["model"]
    rows = []

    def done(name: str, contents: dict[str, Any], seed: int, labels: int, structures: int) -> None:
        told = root / f"{name}-{seed}.json"
        if not told.is_file():
            best, seconds = train(root, name, contents, seed)
            if name == "teacher":
                (root / "teacher.pt").write_bytes(best.read_bytes())
            row = Row(
                name.replace("_", " "), seed, labels, structures, test_error(best, root), seconds
            )
            told.write_text(json.dumps(asdict(row)))
        rows.append(Row(**json.loads(told.read_text())))
        print(f"{name} {seed}: {rows[-1].mae:.2f} eV, {rows[-1].seconds:.0f} s", flush=True)

    everything = SIZES["labelled"] + SIZES["unlabelled"]
    done("teacher", big, 0, everything, teacher_steps * BATCH)
    for seed in seeds:
        done("without_teacher", longer, seed, SIZES["labelled"], 2 * steps * BATCH)
        done("with_teacher", distilled(small), seed, SIZES["labelled"], 2 * steps * BATCH)
    return rows


def table(rows: list[Row], asked: str) -> str:
    """What the rows say, in Markdown."""
    lines = [
        f"`{asked}`; the virial of strained slabs (EMT), {SIZES['test']} structures to test.",
        "",
        "| run | labels | structures seen | test MAE, eV | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row.run for row in rows):
        own = [row for row in rows if row.run == name]
        errors = [row.mae for row in own]
        spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
        lines.append(
            f"| {name} | {own[0].labels} | {own[0].structures} | {mean(errors):.2f}{spread} | "
            f"{len(own)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to work in, or go on in (default: new)")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600, help="of the distilled students")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    asked = (
        f"python benchmarks/other_targets.py --teacher-steps {args.teacher_steps} --steps "
        + str(args.steps)
    )
    with tempfile.TemporaryDirectory() as made:
        root = args.work or Path(made)
        root.mkdir(parents=True, exist_ok=True)
        rows = measure(root.resolve(), args.teacher_steps, args.steps, args.seeds)
    with (args.out / "other_targets.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in rows
        )
    text = table(rows, asked)
    (args.out / "other_targets.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
