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
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from structures_judged import KELVIN, Labels, judged
from structures_tables import write_tables

import fairchem_kd.distillation.trainer  # noqa: F401  (for all that are forked)
from fairchem_kd.analysis.subjects.reference_method import EMT, XTB
from fairchem_kd.analysis.subjects.splits import count_structures
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.commands.main import main as main_of_kd
from fairchem_kd.data.convert.shards import Shard
from fairchem_kd.data.pool import make_pool
from fairchem_kd.explore.rounds import trainings
from fairchem_kd.explore.rounds.trainings import claimed, student_of, train, write_config
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
    aside, told = work / ".long_labelled", Labels(ROOT / case.data, case.method)
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


# -- all of it ------------------------------------------------------------------------------------


def measure(
    name: str, ways: Sequence[str], seeds: Sequence[int], root: Path, stores: Path, out: Path
) -> None:
    """What has not been measured yet, with all tables anew after each student."""
    case, work = CASES[name], root / name
    work.mkdir(parents=True, exist_ok=True)
    long = long_dynamics(case, work, stores)
    labels = Labels(ROOT / case.data, case.method)
    text = ""
    for seed in seeds:
        for way in (FIRST, *ways):
            told = work / f"{way}-{seed}.json"
            if not told.is_file():
                student = trained(case, way, seed, work, stores)
                number = sum(map(count, added(way, seed, case, work, stores)))
                row = {
                    "way": way,
                    "seed": seed,
                    "added": number,
                    **judged(student, ROOT / case.data, labels, long, case.nve),
                }
                write_json(told, row)
            known = [read_json(file) for file in sorted(work.glob("*-*.json"))]
            text = write_tables(name, [row for row in known if "way" in row], NAMES, out)
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
