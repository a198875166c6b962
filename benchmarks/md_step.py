"""A step of MD in ASE: what the model takes of it, and what is around the model.

    python benchmarks/md_step.py
    python benchmarks/md_step.py --device cuda --atoms 10 30 100 300 1000

An untrained PaiNN-small (64 channels, 3 layers, 30 neighbours within 6 Å), with direct and with
conservative forces, on slabs and on boxes of ethanol. In turns, so that a busy machine slows all of
them: stock's forward, the forward with edges that are given, a step through stock's OCPCalculator,
one through StudentCalculator and one through ModuleCalculator (`export --module`), all by ASE's
velocity Verlet at 300 K. Neighbours are searched
anew in some of the steps; what a step costs then is in the mean, not in the median.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import add_adsorbate, fcc111, molecule
from ase.md.verlet import VelocityVerlet
from fairchem.core.modules.scaling import ScaleFactor

from fairchem_kd import ModuleCalculator, StudentCalculator
from fairchem_kd.analysis.cost.timing import circumstances, clock
from fairchem_kd.analysis.subjects.calculators import make_calculator
from fairchem_kd.analysis.subjects.runs import read_model
from fairchem_kd.models.build import build_model, read_units
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.models.module import about, network_of, write_module
from fairchem_kd.models.units import Units

ROOT = Path(__file__).resolve().parents[1]
PAINN_SMALL = {"hidden_channels": 64, "num_layers": 3, "num_rbf": 32, "cutoff": 6.0}
WAYS = (
    "stock forward",
    "forward, edges given",
    "OCPCalculator",
    "StudentCalculator",
    "ModuleCalculator",
)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--atoms", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/md_step")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for forces in ("direct", "conservative"):
            path = write_model(Path(folder), forces)
            for kind, make in (("slab", slab), ("molecules", box)):
                for number in args.atoms:
                    row = {"forces": forces, "structure": kind}
                    row |= measure(path, make(number), args.turns, torch.device(args.device))
                    print(row, flush=True)
                    rows.append(row)
    write(rows, args.out, torch.device(args.device))


def write_model(folder: Path, forces: str) -> Path:
    """A checkpoint of an untrained PaiNN-small, by the shipped one's config."""
    contents = dict(read_checkpoint(ROOT / "checkpoints/painn_collisions.pt"))
    config = contents["config"]
    config["model"] |= {**PAINN_SMALL, "max_neighbors": 30}
    if forces == "conservative":
        config["model"]["regress_forces"] = False
        config["task"] = {**config.get("task", {}), "conservative": True}
    torch.manual_seed(0)
    from fairchem.core.models.painn.painn import PaiNN

    options = {k: v for k, v in config["model"].items() if k not in ("name", "scale_file")}
    model = PaiNN(**options)
    for module in model.modules():
        if isinstance(module, ScaleFactor):
            module.scale_factor.data.fill_(1.0)
    contents["state_dict"] = model.state_dict()
    path = folder / f"{forces}.pt"
    write_checkpoint(contents, path)
    contents = read_checkpoint(path)
    built = build_model(contents, str(path))
    told = about(built, Units(*read_units(contents, "cpu")), None, contents["config"]["outputs"])
    write_module(network_of(built, str(path)), told, path.with_suffix(".pt2"))
    return path


def slab(number: int) -> Atoms:
    """Copper with an oxygen atom, of about so many atoms."""
    side = max(1, round(((number - 1) / 4) ** 0.5))
    made = fcc111("Cu", (side, side, 4 if number > 8 else 2), vacuum=8.0, periodic=True)
    add_adsorbate(made, "O", 1.4, "fcc")
    made.rattle(0.02, seed=0)
    return made


def box(number: int) -> Atoms:
    """Ethanol molecules, 4.5 Å from each other, with room around them."""
    one, made = molecule("CH3CH2OH"), Atoms()
    many = max(1, round(number / len(one)))
    side = int(np.ceil(many ** (1 / 3)))
    for place in list(np.ndindex(side, side, side))[:many]:
        copy = one.copy()
        copy.translate(4.5 * np.array(place))
        made += copy
    made.center(vacuum=10.0)
    made.pbc = True
    made.rattle(0.02, seed=0)
    return made


def measure(path: Path, atoms: Atoms, turns: int, device: torch.device) -> dict[str, Any]:
    """Medians in ms, and ratios turn by turn."""
    stock = make_calculator(read_model(path), cpu=device.type == "cpu")
    ours = StudentCalculator(path, device=device)
    module = ModuleCalculator(path.with_suffix(".pt2"), device=device)
    steps = [moving(atoms, one) for one in (stock, ours, module)]
    searched = StudentCalculator(path, device=device).model  # of its own, whose graphs are stock's
    del searched.model.generate_graph
    batch = ours._systems.batch  # type: ignore[union-attr]

    def forward(model: Any) -> None:
        with ours._mode():
            model.forward(batch)

    ways: list[Callable[[], Any]] = [
        lambda: forward(searched),
        lambda: forward(ours.model),
        *steps,
    ]
    before = ours.searches
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(turns + 3):
        for place in range(len(ways)):
            number = (turn + place) % len(ways)
            seconds = taken_by(ways[number], device)
            if turn >= 3:
                taken[number].append(seconds)
    row: dict[str, Any] = {"atoms": len(atoms)}
    row |= {f"{name} (ms)": 1000 * median(one) for name, one in zip(WAYS, taken, strict=True)}

    def over(one: int, other: int) -> float:
        return median(a / b for a, b in zip(taken[one], taken[other], strict=True))

    row["ours / stock forward"] = over(3, 0)
    row["ours / forward, edges given"] = over(3, 1)
    row["OCPCalculator / ours"] = over(2, 3)
    row["ModuleCalculator / ours"] = over(4, 3)
    row["mean of ours (ms)"] = 1000 * mean(taken[3])
    row["searches"] = ours.searches - before
    return row


def taken_by(way: Callable[[], Any], device: torch.device) -> float:
    """Seconds: of a GPU by the clock, of a CPU's one thread its own, whatever else runs there."""
    if device.type == "cuda" or torch.get_num_threads() > 1:
        return clock(way, device)
    start = time.process_time()
    way()
    return time.process_time() - start


def moving(atoms: Atoms, calculator: Any) -> Callable[[], Any]:
    """A step of NVE dynamics."""
    system = atoms.copy()
    system.calc = calculator
    spread = np.sqrt(units.kB * 300 * system.get_masses())[:, None]
    system.set_momenta(spread * np.random.default_rng(0).normal(size=(len(system), 3)))
    dynamics = VelocityVerlet(system, timestep=0.5 * units.fs)
    dynamics.run(0)
    return lambda: dynamics.run(1)


def write(rows: list[dict[str, Any]], out: Path, device: torch.device) -> None:
    """Table and plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(
            {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    about = ", ".join(f"{key} {value}" for key, value in circumstances(device).items())
    lines = ["# A step of MD", "", f"PaiNN-small, untrained; {about}.", ""]
    lines += [f"| {' | '.join(rows[0])} |", "| --- | --- |" + " ---: |" * (len(rows[0]) - 2)]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(rows, out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds over atoms, a panel for each kind of forces and structure."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys((row["forces"], row["structure"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.2), sharey=True)
    for panel, (forces, structure) in zip(np.atleast_1d(axes), kinds, strict=True):
        own = [r for r in rows if (r["forces"], r["structure"]) == (forces, structure)]
        for name in WAYS:
            values = [row[f"{name} (ms)"] for row in own]
            panel.loglog([row["atoms"] for row in own], values, "o-", markersize=3, label=name)
        panel.set(title=f"{structure}, {forces} forces", xlabel="atoms")
        sizes = [row["atoms"] for row in own]
        panel.set_xticks(sizes, labels=map(str, sizes), minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(which="major", alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("ms per step")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
