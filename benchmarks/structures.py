"""Which structures pay: rattled copies, relaxations, a teacher's dynamics, a student's in rounds.

    OMP_NUM_THREADS=1 python benchmarks/structures.py --sets collisions slabs --seeds 0 1 2

For each data set and seed one student is trained by the recipe: few labels, and the teacher's word
on the whole training set. Each way then trains on from that very student, for as many steps, with
as many more structures of its own kind beside those that were there:

    none     no further structures
    rattle   displaced copies                    (`fairchem-kd explore --mode rattle`)
    relax    rattled, relaxed, and so on         (`--mode relax`)
    md       frames of the teacher's dynamics    (`--mode md`)
    rounds   frames of the student's dynamics, half of them in each of two rounds, the second with
             the student that the first has trained (`fairchem-kd rounds`)
    student  those very frames, all at once

What is judged: errors on the test split, on that of unseen systems, and on frames of long dynamics
of the teacher from structures of the test split; all by the labels' own method. Then NVE dynamics
of the student from structures of the test split: how many last, how the total energy drifts, and
how far its forces are from the method's on the frames that it went through.

Whatever has ended is kept in the folder of the work, so that the same command goes on. Tables are
written after every student.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml

import fairchem_kd.distillation.trainer  # noqa: F401  (for all that are forked)
from fairchem_kd.analysis.compare.evaluation import evaluate
from fairchem_kd.analysis.physics.dynamics import CLOSEST, MAX_FORCE
from fairchem_kd.analysis.subjects.reference_method import EMT, XTB, method_calculator
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.splits import count_structures, open_split
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.commands.main import main as main_of_kd
from fairchem_kd.data.convert.shards import Shard
from fairchem_kd.explore.dynamics import Walker, drive
from fairchem_kd.explore.guards import Limits
from fairchem_kd.explore.potentials import Answer, ModelPotential
from fairchem_kd.explore.rattling import placed
from fairchem_kd.explore.rounds import trainings
from fairchem_kd.explore.rounds.pool import make_pool
from fairchem_kd.explore.rounds.trainings import claimed, student_of, train, write_config
from fairchem_kd.explore.settings import Settings
from fairchem_kd.explore.starts import Source, Start, read_starts
from fairchem_kd.files import write_json
from fairchem_kd.reading import read_json
from fairchem_kd.stock.configs import load_config
from fairchem_kd.teachers.place import VARIABLE
from fairchem_kd.training.schedule import steps_per_epoch, stretch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIRST, WAYS = "first", ("none", "rattle", "relax", "md", "rounds", "student")
NAMES = {
    FIRST: "before",
    "none": "no further structures",
    "rattle": "rattled copies",
    "relax": "rattle, relax, repeat",
    "md": "teacher's dynamics",
    "rounds": "student's dynamics, in rounds",
    "student": "the same frames at once",
}
KELVIN = 500.0


@dataclass(frozen=True)
class Case:
    """A data set, and how much is done with it."""

    data: str
    recipe: str  #: config of a distillation on outputs, with few labels
    method: str
    added: int  #: structures, of each way
    epochs: int  #: of training on, of which the ways take twice as many
    rate: float  #: of learning, in training on: half of the recipe's
    starts: int  #: structures with which dynamics begin; copies are of twice as many
    steps: int  #: of dynamics that make structures
    every: int
    long: tuple[int, int, int]  #: the teacher's long dynamics: structures, steps, between frames
    nve: tuple[int, int]  #: the student's: structures, steps


CASES = {
    "collisions": Case(
        data="data/collisions", recipe="yaml_configs/demo/outputs.yml", method=XTB, added=1000,
        epochs=4, rate=2e-3, starts=124, steps=120, every=12, long=(48, 800, 80), nve=(12, 600),
    ),
    "slabs": Case(
        data="data/slabs", recipe="yaml_configs/kd/vanilla.yml", method=EMT, added=600,
        epochs=1, rate=1e-3, starts=84, steps=80, every=8, long=(16, 300, 30), nve=(8, 400),
    ),
}  # fmt: skip


# -- commands -------------------------------------------------------------------------------------


def forked(work: Callable[[], int], log: Path, environment: Mapping[str, str]) -> int:
    """Do it in a process that has the imports of this one behind it; its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(words: Sequence[object], log: Path, stores: Path) -> None:
    """Run ``fairchem-kd``."""
    said = [str(word) for word in words]
    if forked(lambda: main_of_kd(said), log, {VARIABLE: str(stores)}):
        raise SystemExit(f"{' '.join(said)} failed; see {log}")


def run_training(command: Sequence[str], log: Path, environment: Mapping[str, str], _: int) -> int:
    """In place of :func:`fairchem_kd.explore.rounds.trainings.run_command`."""
    words = list(command[command.index("main") :])
    return forked(lambda: fairchem(words), log, {VARIABLE: environment[VARIABLE]})


# -- structures -----------------------------------------------------------------------------------


def dynamics(case: Case) -> list[object]:
    """The options of dynamics that make structures, the teacher's and the student's."""
    return [
        *("--limit", case.starts, "--steps", case.steps, "--every", case.every),
        *("--temperature", KELVIN, "--max-gap", 20),
    ]


def explored(case: Case, way: str, work: Path, stores: Path) -> Path:
    """The split of structures that a way has made, which does not depend on the seed."""
    dest = work / way
    if (dest / "train").is_dir():
        return dest / "train"
    options: list[object] = ["--copies", 6, "--limit", 2 * case.starts]
    if way == "relax":
        options += ["--temperature", KELVIN]
    if way == "md":
        options = dynamics(case)
    words = ["explore", ROOT / case.data / "train", "--out", dest, "--mode", way, "--cpu"]
    words += ["--teacher", teacher_of(case), "--frames", case.added, *options, "--batch", 32]
    run(words, work / f"{way}.log", stores)
    return dest / "train"


def teacher_of(case: Case) -> Path:
    return ROOT / recipe(case)["task"]["distillation"]["teacher"]["checkpoint"]


def long_dynamics(case: Case, work: Path, stores: Path) -> Path:
    """Frames of the teacher's long dynamics from the test split, labelled by the method."""
    dest = work / "long_labelled"
    if dest.is_dir():
        return dest
    count, steps, every = case.long
    words = ["explore", ROOT / case.data / "test", "--out", work / "long", "--mode", "md"]
    words += ["--teacher", teacher_of(case), "--limit", count, "--steps", steps, "--every", every]
    words += ["--temperature", KELVIN, "--max-gap", 20, "--store", "off", "--seed", 1]
    run([*words, "--batch", count, "--cpu"], work / "long.log", stores)
    aside, told = work / ".long_labelled", Labels(case)
    shard, sizes = Shard(aside / "data.0000.lmdb"), []
    with open_structures(str(work / "long" / "test")) as opened:
        for sample in opened.samples():
            said = told(np.asarray(sample.atomic_numbers), np.asarray(sample.pos), sample.cell[0])
            if said is None:
                continue
            sample.energy = float(said.energy)
            sample.forces = sample.forces.new_tensor(said.forces)
            shard.add(sample)
            sizes.append(int(sample.natoms))
    shard.close()
    np.savez(aside / "metadata.npz", natoms=np.array(sizes))
    aside.rename(dest)
    return dest


class Labels:
    """What the method says of a structure, with the energies' zero of the data set."""

    def __init__(self, case: Case) -> None:
        card = read_json(ROOT / case.data / "card.json")
        self.references = {int(z): e for z, e in card["reference_energies"].items()}
        self.calculator = method_calculator(case.method)
        self.pbc = case.method == EMT

    def __call__(self, numbers: Any, pos: Any, cell: Any) -> Answer | None:
        import ase
        from ase.calculators.calculator import CalculationFailed

        atoms = ase.Atoms(numbers, pos, cell=np.asarray(cell), pbc=self.pbc)
        atoms.calc = self.calculator
        try:
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        except CalculationFailed:
            return None
        return Answer(float(energy - sum(self.references[int(z)] for z in numbers)), forces)


# -- trainings ------------------------------------------------------------------------------------


def recipe(case: Case) -> dict[str, Any]:
    config, _, _ = load_config(ROOT / case.recipe)
    config.pop("includes", None)
    return config


def config_of(case: Case) -> dict[str, Any]:
    """The recipe; test sets are for the end."""
    config = copy.deepcopy(recipe(case))
    config["dataset"].pop("test", None)
    config["logger"] = "tensorboard"
    return config


def trained(case: Case, way: str, seed: int, work: Path, stores: Path) -> Path:
    """The student of a way and a seed."""
    if way == "rounds":
        return in_rounds(case, seed, work, stores)
    folder = work / f"{way}-{seed}"
    with claimed(folder) as lock:
        best = student_of(folder)
        if best is not None:
            return best
        config, start = config_of(case), None
        if way != FIRST:
            unlabelled = config["task"]["distillation"]["unlabelled"]
            pool = folder / "pool"
            make_pool(
                pool, [Path(unlabelled["dataset"]["src"]), *added(way, seed, case, work, stores)]
            )
            unlabelled["dataset"] = {"format": "lmdb", "src": str(pool)}
            labelled = count_structures(config["dataset"]["train"])
            config = stretch(config, 2 * case.epochs, steps_per_epoch(config, labelled))
            config["optim"]["lr_initial"] = case.rate
            start = trained(case, FIRST, seed, work, stores)
        return train(
            folder, write_config(folder, config), start=start, seed=seed, more=["--cpu"],
            lock=lock, stores=stores,
        )  # fmt: skip


def in_rounds(case: Case, seed: int, work: Path, stores: Path) -> Path:
    """The student of two rounds."""
    out = work / f"rounds-{seed}"
    if student_of(out / "round_2") is None:
        file = work / f"rounds-{seed}.yml"
        file.write_text(yaml.safe_dump(config_of(case)))
        words = ["rounds", file, "--out", out, "--rounds", 2, "--seed", seed, "--no-control"]
        words += ["--student", trained(case, FIRST, seed, work, stores), "--epochs", case.epochs]
        words += ["--lr", case.rate]
        words += ["--frames", case.added // 2, *dynamics(case), "--batch", 64, "--cpu"]
        run(words, work / f"rounds-{seed}.log", stores)
    best = student_of(out / "round_2")
    if best is None:
        raise SystemExit(f"{out} has ended before its second round; see its log")
    return best


def added(way: str, seed: int, case: Case, work: Path, stores: Path) -> list[Path]:
    """The splits of further structures."""
    if way in (FIRST, "none"):
        return []
    if way not in ("rounds", "student"):
        return [explored(case, way, work, stores)]
    in_rounds(case, seed, work, stores)
    found = [work / f"rounds-{seed}" / f"round_{number}" / "frames" for number in (0, 1)]
    return [one for frames in found for one in sorted(frames.iterdir()) if one.is_dir()]


def count(folder: Path) -> int:
    with open_structures(str(folder)) as opened:
        return sum(1 for _ in opened.samples())


# -- judging --------------------------------------------------------------------------------------


def judged(case: Case, student: Path, long: Path) -> dict[str, float]:
    """Errors, meV and meV/Å, and the student's own dynamics."""
    model = load_model(read_model(student))
    found: dict[str, float] = {}
    splits = {name: ROOT / case.data / name for name in ("test", "test_ood")} | {"long": long}
    for name, path in splits.items():
        with open_split({"format": "lmdb", "src": str(path)}, name) as split:
            metrics = evaluate(model, split, batch_size=64).metrics
        found[f"{name} E"] = 1e3 * metrics["energy_mae"]
        found[f"{name} F"] = 1e3 * metrics["forces_mae"]
    return found | nve(case, student)


def nve(case: Case, student: Path) -> dict[str, float]:
    """The student's NVE dynamics from the test split, all structures side by side."""
    number, steps = case.nve
    starts = list(read_starts(Source(ROOT / case.data / "test", "test"), number))
    settings = Settings(
        mode="student", seed=2, temperature=(KELVIN, KELVIN), steps=steps, every=steps // 20,
        friction=0.0, limits=Limits(CLOSEST, 1e6, MAX_FORCE), batch=number,
    )  # fmt: skip
    walkers = [Walker(i, start, settings) for i, start in enumerate(starts)]
    total: dict[int, list[float]] = {walker.number: [] for walker in walkers}
    visited: list[tuple[Start, Any, Any]] = []

    def at_frames(step: int, going: Sequence[tuple[Walker, Answer]]) -> None:
        for walker, answer in going:
            mass = walker.atoms.get_masses()[:, None]
            kinetic = 0.5 * float((mass * walker.velocity**2).sum())
            total[walker.number].append((answer.energy + kinetic) / len(walker.atoms))
            if step % (steps // 5) == 0:
                visited.append((walker.start, walker.atoms.positions.copy(), answer.forces))

    drive(walkers, ModelPotential(student, cpu=True), settings, at_frames, lambda *_: None)
    lasted = [walker for walker in walkers if not walker.done]
    time_ps = settings.time_step * settings.every / 1000
    slopes = [
        abs(np.polyfit(time_ps * np.arange(len(total[w.number])), total[w.number], 1)[0])
        for w in lasted
    ]
    apart = list(_apart(case, visited))
    return {
        "lasted": 100 * len(lasted) / len(walkers),
        "drift": 1e3 * float(np.median(slopes)) if slopes else float("nan"),
        "own F": 1e3 * float(np.concatenate(apart).mean()) if apart else float("nan"),
    }


def _apart(case: Case, visited: Sequence[tuple[Start, Any, Any]]) -> Iterator[Any]:
    """Absolute differences of the student's forces from the method's, on free atoms, eV/Å."""
    told = Labels(case)
    for start, pos, forces in visited:
        at = placed(start, pos)
        said = told(start.numbers, at.positions, start.cell)
        if said is not None:
            yield np.abs(forces - said.forces)[start.free].ravel()


# -- tables ---------------------------------------------------------------------------------------

COLUMNS = (
    "test E", "test F", "test_ood E", "test_ood F", "long E", "long F", "lasted", "drift", "own F",
)  # fmt: skip


def write_tables(name: str, rows: Sequence[dict[str, Any]], out: Path) -> str:
    """A CSV of all students, a table of means and standard deviations over seeds, and a plot."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"structures_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["way", "seed", "added", *COLUMNS])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"`python benchmarks/structures.py --sets {name} --seeds {' '.join(map(str, seeds))}`; "
        "mean and standard deviation over seeds; E in meV, F in meV/Å; `long`: frames of the "
        "teacher's long dynamics; of the student's NVE dynamics those that lasted (%), the median "
        "drift of the total energy (meV/atom/ps), and the error of its forces on its own way.",
        "",
        "| added | structures | " + " | ".join(COLUMNS) + " | seeds |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    for way in (FIRST, *WAYS):
        own = [row for row in rows if row["way"] == way]
        if own:
            cells = [_cell([row[column] for row in own]) for column in COLUMNS]
            added = "-".join(map(str, sorted({row["added"] for row in own})))
            lines.append(f"| {NAMES[way]} | {added} | {' | '.join(cells)} | {len(own)} |")
    text = "\n".join(lines) + "\n"
    (out / f"structures_{name}.md").write_text(text, encoding="utf-8")
    _plot(name, rows, out / f"structures_{name}.png")
    return text


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{_digits(mean(known))}f}" if len(known) > 1 else ""
    return f"{mean(known):.{_digits(mean(known))}f}{spread}"


def _digits(value: float) -> int:
    return 0 if abs(value) >= 20 else 1


def _plot(name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    shown = {"test F": "test", "long F": "teacher's long dynamics", "own F": "student's own way"}
    shown["test_ood F"] = "unseen systems"
    for panel, (column, title) in zip(panels, shown.items(), strict=True):
        for place, way in enumerate(ways):
            values = [row[column] for row in rows if row["way"] == way]
            panel.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            panel.plot([mean(values)], [place], "|", color="k", markersize=14)
        panel.set_title(title, size=10)
        panel.set_xlabel("force error (meV/Å)")
    panels[0].set_yticks(range(len(ways)), [NAMES[way] for way in ways])
    panels[0].invert_yaxis()
    figure.suptitle(f"{name}: what was added", size=11)
    figure.savefig(path, dpi=150)


# -- all of it ------------------------------------------------------------------------------------


def measure(
    name: str, ways: Sequence[str], seeds: Sequence[int], root: Path, stores: Path, out: Path
) -> None:
    """What has not been measured yet, with all tables anew after each student."""
    case, work = CASES[name], root / name
    work.mkdir(parents=True, exist_ok=True)
    long = long_dynamics(case, work, stores)
    text = ""
    for seed in seeds:
        for way in (FIRST, *ways):
            told = work / f"{way}-{seed}.json"
            if not told.is_file():
                student = trained(case, way, seed, work, stores)
                number = sum(map(count, added(way, seed, case, work, stores)))
                row = {"way": way, "seed": seed, "added": number, **judged(case, student, long)}
                write_json(told, row)
            known = [read_json(file) for file in sorted(work.glob("*-*.json"))]
            text = write_tables(name, [row for row in known if "way" in row], out)
            print(f"{name}: {way}, seed {seed}", flush=True)
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "structures")
    parser.add_argument("--stores", type=Path, help="of teachers (default: in the work's folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.chdir(ROOT)
    trainings.run_command = run_training
    work = args.work.resolve()
    for name in args.sets:
        stores = (args.stores or work / "teacher_stores").resolve()
        measure(name, args.ways, args.seeds, work, stores, args.out)


if __name__ == "__main__":
    main()
