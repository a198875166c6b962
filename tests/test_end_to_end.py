"""The user's own line on real data, and its student in a process that has no fairchem_kd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Command

from fairchem_kd.analysis.cka.layers import compare_layers, distilled_pairs
from fairchem_kd.analysis.subjects.runs import load_model, read_model
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.models.build import build
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units
from fairchem_kd.training.records import read_records

REPOSITORY = Path(__file__).parents[1]
#: The training set's first quarter, by whole trajectories, has labels: 4 steps of 2 structures.
QUARTER = 8
SIZES = {"train": 24, "val": 8, "test": 8, "test_ood": 8}

# Runs stock fairchem where importing fairchem_kd fails, as on a machine without it.
STOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fairchem_kd":
            raise ModuleNotFoundError("No module named 'fairchem_kd'", name="fairchem_kd")

sys.meta_path.insert(0, Absent())
from fairchem.core import OCPCalculator
from fairchem.core._cli import main

checkpoint, best = sys.argv[1:3]
for mode, path, more in (
    ("validate", best, []),
    ("predict", best, []),
    ("train", checkpoint, ["--optim.max_epochs=2", "--optim.eval_every=3"]),
):
    sys.argv = ["fairchem", "--cpu", "--mode", mode, "--config-yml", "stock.yml"]
    sys.argv += ["--checkpoint", path, "--identifier", f"stock-{mode}", *more]
    main()

from ase.build import add_adsorbate, fcc111
slab = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
add_adsorbate(slab, "O", 1.3, "fcc")
slab.calc = OCPCalculator(checkpoint_path=best, cpu=True)
print("energy", slab.get_potential_energy(), "forces", abs(slab.get_forces()).max())
assert "fairchem_kd" not in sys.modules
"""


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's folder has: the configs and the shipped teachers; no data yet."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(REPOSITORY / "yaml_configs", folder / "yaml_configs")
    (folder / "checkpoints").mkdir()
    for path in (REPOSITORY / "checkpoints").glob("gemnet_oc_slabs.*"):
        shutil.copy(path, folder / "checkpoints")
    return folder


LINE = "main --mode train --config-yml yaml_configs/kd/e2n.yml"


def small() -> list[str]:
    """What makes the data sets of the user's own line smaller."""
    others = "--task.distillation.unlabelled"
    blocks = [f"--dataset.{split}" for split in ("train", "val", "test")] + [f"{others}.dataset"]
    sizes = [f"{block}.build.{name}={size}" for block in blocks for name, size in SIZES.items()]
    return [*sizes, f"{others}.skip={QUARTER}"]


@pytest.mark.slow
def test_the_users_own_line(workplace: Path) -> None:
    """With a smaller data set and one epoch; everything else is as written."""
    short = ["--optim.max_epochs=1", "--optim.eval_every=4", "--print-every", "1"]
    done = run("-m", "fairchem_kd", *LINE.split(), *short, *small(), cwd=workplace)
    assert "No CUDA device here: running on the CPU" in done.stderr + done.stdout

    (run_folder,) = [p for p in (workplace / "checkpoints").iterdir() if p.is_dir()]
    records = read_records(run_folder)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    assert all(r["metrics"]["e2n"] > 0 for r in records if r["kind"] == "train")
    (validation,) = [r for r in records if r["kind"] == "val"]
    assert 0 < validation["metrics"]["forces_mae"] < 10
    told = [line.partition(" ")[2] for line in done.stdout.splitlines()]
    place = run_folder.relative_to(workplace)
    assert f"Done: 4 steps. The student is {place}/best_checkpoint.pt" in told
    for split in ("val", "test"):
        assert any(line.startswith(f"{split} (MAE of 8 structures): energy ") for line in told)
    assert f"Compare it: fairchem-kd compare PLAIN_RUN {place}" in told
    assert "base_trainer.py" not in done.stdout + done.stderr
    best = read_checkpoint(run_folder / "best_checkpoint.pt")
    assert best["config"]["trainer"] == "ocp"
    assert best["config"]["model"]["name"] == "painn"

    stock = (workplace / "yaml_configs/kd/none.yml").read_text()
    stock += "\ntrainer: ocp\ndataset: {train: {src: data/slabs/train}}\n"
    (workplace / "stock.yml").write_text(stock)
    done = run(
        "-W",
        "ignore",
        "-c",
        STOCK,
        str(run_folder / "checkpoint.pt"),
        str(run_folder / "best_checkpoint.pt"),
        cwd=workplace,
    )
    assert "energy" in done.stdout
    predictions = list((workplace / "results").glob("*stock-predict/*.npz"))
    assert len(predictions) == 1
    tuned = [p for p in (workplace / "checkpoints").iterdir() if p.name.endswith("stock-train")]
    assert read_checkpoint(tuned[0] / "checkpoint.pt")["step"] == 6


@pytest.mark.slow
def test_the_first_steps_make_the_students_atoms_more_like_the_teachers_edges(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 steps of the shipped recipe: its term falls, and the similarity of its layers rises."""
    steps = ["--optim.max_epochs=50", "--optim.eval_every=100", "--print-every", "10"]
    argv = [*LINE.split(), *steps, *small(), "--identifier", "first", "--run-dir", "first",
            "--seed", "3"]  # fmt: skip
    Command(argv, workplace, workplace / "log").finish()
    (folder,) = (workplace / "first/checkpoints").iterdir()
    values = [r["metrics"]["e2n"] for r in read_records(folder, "train")]
    assert len(values) == 20
    assert sum(values[-3:]) < 0.7 * sum(values[:3])

    monkeypatch.chdir(workplace)
    file = read_model(folder)
    trained, teacher = load_model(file), load_model(read_model(str(file.teacher)))
    torch.manual_seed(3)
    fresh = Teacher(build(file.config["model"], folder), Units({}, {}), {})
    (pair,) = distilled_pairs(file)
    ends = {"student": pair.student, "fresh": pair.student, "teacher": pair.teacher}
    with open_structures({"format": "lmdb", "src": "data/slabs/test"}) as structures:
        found = compare_layers(
            {"student": trained, "fresh": fresh, "teacher": teacher},
            [("fresh", "teacher"), ("student", "teacher")],
            structures,
            {name: {"node": [address], "vector": []} for name, address in ends.items()},
        )
    before, after = (one.estimates[0][0].value for one in found.maps)
    assert after > before + 0.02, (before, after)
