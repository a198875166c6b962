"""``fairchem-kd compare``: errors as stock fairchem has them, groups, roles, files, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from fairchem.core.trainers import OCPTrainer
from torch_geometric.data import Batch
from trainings import config, inside, trainer, write_home, write_lmdb

from fairchem_kd.analysis.compare.comparison import Comparison, Group, assign_roles, group_by_recipe
from fairchem_kd.analysis.compare.evaluation import evaluate, within
from fairchem_kd.analysis.compare.gap import target_errors
from fairchem_kd.analysis.compare.tables import unlike_baselines
from fairchem_kd.analysis.cost.throughput import measure_throughput
from fairchem_kd.analysis.subjects.runs import find_checkpoint, load_model, read_model
from fairchem_kd.analysis.subjects.splits import (
    given_split,
    open_split,
    split_settings,
    splits_of_run,
)
from fairchem_kd.commands import main as cli
from fairchem_kd.errors import UserError

SIZES = {"train": 12, "val": 4, "test": 9, "test_ood": 6}
METRICS = ["mae", "cosine_similarity", "magnitude_error", "energy_forces_within_threshold"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data with two test splits, a teacher, two seeds of plain and e2n."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        # trajectories of three frames: each sid stands thrice
        write_home(SIZES, sid=lambda _, i: i // 3, fid=lambda _, i: i % 3)
        for name, losses in (("plain", None), ("e2n", {"e2n": {}})):
            for seed in (0, 1):
                run = config(
                    Path("."), Path("data"), losses=losses, teacher=Path("teacher.pt"), max_epochs=1
                )
                run["dataset"]["test"] = {"format": "lmdb", "src": "data/test"}
                with trainer(run, seed=seed, identifier=f"{name}-s{seed}") as built:
                    built.train(disable_eval_tqdm=True)
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def run_of(name: str) -> Path:
    [folder] = Path("checkpoints").glob(f"*-{name}")
    return folder


@pytest.mark.parametrize("free_atoms", [True, False])
@pytest.mark.parametrize("path", ["teacher.pt", "e2n-s0"])
def test_errors_are_those_of_a_stock_trainer(home: Path, path: str, free_atoms: bool) -> None:
    file = read_model(path if path.endswith(".pt") else run_of(path))
    settings = copy.deepcopy(dict(file.config))
    outputs = settings["outputs"]
    outputs["forces"]["eval_on_free_atoms"] = free_atoms
    # stock's EFwT and per-atom error go by the free atoms, and so fail where all atoms count
    forces = METRICS if free_atoms else METRICS[:-1]
    with trainer(
        {
            "task": {},
            "model": settings["model"],
            "outputs": outputs,
            "dataset": {"train": {}, "val": {"format": "lmdb", "src": "data/test"}},
            "optimizer": {**settings["optim"], "eval_batch_size": 4},
            "loss_functions": settings["loss_functions"],
            "evaluation_metrics": {"metrics": {"energy": ["mae"], "forces": forces}},
            "identifier": "reference",
            "local_rank": 0,
            "is_debug": True,
            "cpu": True,
        },
        OCPTrainer,
    ) as stock:
        stock.load_checkpoint(str(file.path), inference_only=True)
        expected = stock.validate(split="val", disable_tqdm=True)
    model = load_model(file)
    with open_split(split_settings(file.config, "data/test")) as split:
        found = evaluate(model, split, batch_size=4, free_atoms=free_atoms)
        energies = torch.tensor([split.dataset[i].energy for i in range(len(split))])
        natoms = [split.dataset[i].natoms for i in range(len(split))]
    for name in ("energy_mae", *(f"forces_{metric}" for metric in METRICS[:-1])):
        assert found.metrics[name] == pytest.approx(expected[name]["metric"], rel=2e-5), name
    if free_atoms:
        strict = expected["energy_forces_within_threshold"]["metric"]
        assert found.metrics["efwt"] == within(found.systems, 0.02, 0.03) == strict

    systems = found.systems
    assert systems["sid"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert systems["natoms"].tolist() == natoms
    np.testing.assert_allclose(found.parity["energy_label"], energies, rtol=1e-6)
    per_atom = np.abs(found.parity["energy"] - found.parity["energy_label"]) / natoms
    assert found.metrics["energy_mae_per_atom"] == pytest.approx(per_atom.mean())
    for target in ("energy_mae", "forces_mae"):
        assert target_errors(systems, target).mae == pytest.approx(found.metrics[target], rel=2e-5)
    counted = systems["counted_atoms"].sum()
    assert (counted < sum(natoms)) == free_atoms
    assert systems["forces_cosine"].sum() / counted == pytest.approx(
        found.metrics["forces_cosine_similarity"], rel=1e-5
    )


def test_batches_whose_atoms_are_all_fixed_count_for_energies(home: Path, tmp_path: Path) -> None:
    """One structure in a batch, and of every other one no atom is free."""
    write_lmdb(tmp_path / "some", 4, seed=30, fixed=lambda f, i: torch.ones_like(f) if i % 2 else f)
    write_lmdb(tmp_path / "all", 2, seed=30, fixed=lambda f, _: torch.ones_like(f))
    model = load_model(read_model("teacher.pt"))
    with open_split(split_settings({}, str(tmp_path / "some"))) as split:
        found = evaluate(model, split, batch_size=1, free_atoms=True)
        energy, forces = [], []
        for index in range(4):
            sample = split.dataset[index]
            batch = Batch.from_data_list([sample])
            said = model.denormalized(model.forward(batch), batch)
            energy.append(abs(float(said["energy"]) - float(sample.energy)))
            forces += (said["forces"] - sample.forces)[sample.fixed == 0].abs().flatten().tolist()
    assert found.metrics["energy_mae"] == pytest.approx(np.mean(energy), rel=1e-4)
    assert found.metrics["forces_mae"] == pytest.approx(np.mean(forces), rel=1e-4)
    assert (found.systems["counted_atoms"] == 0).sum() == 2
    assert target_errors(found.systems, "forces_mae").mae == pytest.approx(
        np.mean(forces), rel=1e-4
    )
    with (
        open_split(split_settings({}, str(tmp_path / "all"))) as split,
        pytest.raises(UserError, match=r"No atom of the split .* is free.*--atoms all"),
    ):
        evaluate(model, split, batch_size=1, free_atoms=True)


def test_looser_thresholds_count_more() -> None:
    systems = {
        "energy_error": np.array([0.01, -0.01, 0.05, -0.5]),
        "forces_max_error": np.array([0.02, 0.1, 0.1, 0.01]),
    }
    assert within(systems, 0.02, 0.03) == 0.25
    assert within(systems, 0.1, 0.15) == 0.75
    assert within(systems, 1.0, 1.0) == 1.0


def test_throughput_says_what_it_depends_on() -> None:
    file = read_model("teacher.pt")
    with open_split(split_settings(file.config, "data/test")) as split:
        found = measure_throughput(load_model(file), split, batch_size=4, repeats=3)
    assert found.batch_size == 4
    assert len(found.seconds) == 3
    middle = sorted(found.seconds)[1]
    assert found.systems_per_second == pytest.approx(4 / middle)
    assert found.atoms_per_second == pytest.approx(found.atoms / middle)
    assert (found.threads, found.flush_denormal) == (torch.get_num_threads(), False)


@pytest.mark.slow
def test_the_command(home: Path) -> None:
    """As a user runs it: teacher, baseline, seeds and data are found in the runs themselves."""
    runs = [str(run_of(f"{name}-s{seed}")) for name in ("plain", "e2n") for seed in (0, 1)]
    log = home / "log"
    words = ["compare", *runs, "--cpu", "--batch-size", "4", "--out", "out"]
    Command(words, home, log, of="fairchem-kd").finish()
    said = log.read_text()
    assert "Errors on test (data/test: 9 structures of 3 systems)" in said
    assert "Errors on test_ood (data/test_ood: 6 structures of 2 systems)" in said
    assert "e2n against plain on test: energy" in said
    results = json.loads(Path("out/results.json").read_text())
    assert [(m["label"], m["role"]) for m in results["models"]] == [
        ("teacher", "teacher"),
        ("plain", "baseline"),
        ("e2n", "student"),
    ]
    teacher, plain, distilled = results["models"]
    assert [run["seed"] for run in distilled["runs"]] == [0, 1]
    assert distilled["losses"] == ["e2n"]
    assert distilled["steps"] == 4
    assert distilled["runs"][0]["training_seconds"] > 0
    assert distilled["throughput"] == plain["throughput"] != teacher["throughput"]
    gap = results["splits"]["test"]["gaps"]["e2n"]["energy_mae"]
    for model, name in ((plain, "student"), (distilled, "distilled"), (teacher, "teacher")):
        values = [run["metrics"]["test"]["energy_mae"] for run in model["runs"]]
        assert gap[name] == pytest.approx(np.mean(values), rel=1e-5)
    assert gap["paired"] is True
    low, high = gap["gain_over_seeds"]
    assert low < gap["gain"] < high

    arrays = np.load("out/systems.npz")
    assert arrays["test/e2n/1/energy_error"].shape == (9,)
    text = Path("out/table.md").read_text()
    assert "| e2n | plain |" in text
    for name in ("errors", "front", "pareto", "learning_curves", "parity_test", "parity_test_ood"):
        assert Path(f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
        drawn = Path(f"out/{name}.svg").read_text()
        assert "eV" in drawn  # axes have units, and text is text
        assert "e2n" in drawn


def test_json_for_machines_and_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", f"mine={run_of('e2n-s0')}", "--json", "--no-throughput", "--cpu"]
    try:
        assert cli.main([*argv, "--split", "here=data/test"]) == 0
    finally:
        torch.set_flush_denormal(False)
    results = json.loads(capsys.readouterr().out)
    assert list(results["splits"]) == ["here"]
    assert results["splits"]["here"]["gaps"] == {}  # without a baseline there is no gap
    assert [model["label"] for model in results["models"]] == ["teacher", "mine"]
    assert results["models"][1]["throughput"] is None


def test_groups_and_roles(home: Path) -> None:
    plain = [read_model(run_of(f"plain-s{seed}")) for seed in (0, 1)]
    distilled = read_model(run_of("e2n-s0"))
    teacher = read_model("teacher.pt")
    last = read_model(run_of("plain-s0") / "checkpoint.pt")
    groups = group_by_recipe([(None, plain[0]), (None, distilled), (None, plain[1]), (None, last)])
    assert [(group.label, group.seeds) for group in groups] == [
        ("plain", [0, 1]),
        ("e2n-s0", [0]),
        ("plain-s0", [0]),
    ]
    labelled = group_by_recipe([("x", plain[0]), ("x", plain[1]), (None, distilled)])
    roles = assign_roles(labelled, teacher=teacher)
    assert [(g.label, g.role) for g in roles] == [
        ("teacher", "teacher"),
        ("x", "baseline"),
        ("e2n-s0", "student"),
    ]
    with pytest.raises(UserError, match=r"plain-s0.*--baseline"):
        assign_roles(groups, teacher=teacher)
    named = assign_roles(groups, teacher=None, baselines=["plain-s0"])
    assert [g.role for g in named] == ["student", "student", "baseline"]
    with pytest.raises(UserError, match=r"no model is called 'plian' \(did you mean 'plain'"):
        assign_roles(groups, teacher=None, baselines=["plian"])
    with pytest.raises(UserError, match="given twice"):
        group_by_recipe([(None, plain[0]), ("other", plain[0])])


def test_another_training_than_the_baselines_is_said(home: Path, tmp_path: Path) -> None:
    plain, distilled = Group("plain", [read_model(run_of("plain-s0"))]), run_of("e2n-s0")
    alike = Group("e2n", [read_model(distilled)])
    pair = {"e2n": "plain"}
    assert unlike_baselines(Comparison([plain, alike], [], True, baselines=pair)) == []
    shutil.copytree(distilled, tmp_path / "longer")
    with (tmp_path / "longer/records.jsonl").open("a") as records:
        records.write(json.dumps({"kind": "train", "step": 99, "seconds": 1.0}) + "\n")
    longer = read_model(tmp_path / "longer")
    config = {**longer.config, "dataset": {"src": "data/more"}}
    unlike = Group("e2n", [dataclasses.replace(longer, config=config)])
    [note] = unlike_baselines(Comparison([plain, unlike], [], True, baselines=pair))
    assert re.search(r"'e2n' and its baseline 'plain' .*: 99 steps against \d+; labels from", note)
    assert "labels from data/more against data/train." in note


def test_a_runs_folder(home: Path, tmp_path: Path) -> None:
    best = run_of("e2n-s1") / "best_checkpoint.pt"
    assert find_checkpoint(best) == find_checkpoint(run_of("e2n-s1")) == best
    one = tmp_path / "one" / "checkpoints" / "somewhen-e2n"
    one.mkdir(parents=True)
    for name in ("checkpoint.pt", "best_checkpoint.pt"):
        (one / name).touch()
    assert find_checkpoint(tmp_path / "one") == one / "best_checkpoint.pt"
    with pytest.raises(UserError, match="has neither"):
        find_checkpoint(Path())  # four runs


def test_splits_are_found(home: Path) -> None:
    settings = read_model(run_of("plain-s0")).config
    assert list(splits_of_run(settings)) == ["test", "test_ood"]
    without = {**settings, "test_dataset": {}}
    assert splits_of_run(without)["test"]["src"] == "data/test"
    elsewhere = {"dataset": {"src": "x/train"}, "val_dataset": {"src": "data/val"}}
    assert [s["src"] for s in splits_of_run(elsewhere).values()] == ["data/val", "data/test_ood"]
    assert splits_of_run({}) == {}
    some = {"src": "data/test", "format": "lmdb", "test_split_settings": {"first_n": 3}}
    with open_split(splits_of_run({**settings, "test_dataset": some})["test"]) as split:
        assert len(split) == 3
    quarter = {"dataset": {"format": "lmdb", "src": "a", "first_n": 3, "build": {"recipe": "b"}}}
    assert given_split("q=data/val", quarter) == ("q", {"format": "lmdb", "src": "data/val"})
    assert given_split("data/val", quarter)[0] == "val"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["no/such"], "no/such does not exist"),
        (["data"], "has neither best_checkpoint.pt nor checkpoint.pt"),
        (["checkpoints"], "it holds the runs"),
        (["data/test/metadata.npz"], "is not a fairchem checkpoint|damaged|not a PyTorch"),
        (["teacher.pt", "--split", "data/nowhere"], "the split nowhere.src: .*does not exist"),
        (["teacher.pt", "--split", "slabs.xyz"], "`fairchem-kd data convert slabs.xyz DATA`"),
        (["teacher.pt", "--split", "files"], "`fairchem-kd data convert files DATA` makes"),
        (["teacher.pt", "--out", "slabs.xyz"], "--out slabs.xyz: slabs.xyz is a file"),
        (["teacher.pt", "--out", "slabs.xyz/found"], "slabs.xyz is a file; name a folder"),
        (["teacher.pt", "--split", "a=data/val", "--split", "a=data/test"], "splits are called a"),
        (["teacher.pt", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["=teacher.pt"], "is no run"),
        (["teacher.pt", "teacher.pt"], "given twice"),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (Path("slabs.xyz"), Path("files/all.xyz")):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    try:
        assert cli.main(["compare", *argv, "--no-throughput", "--cpu"]) == 2
    finally:
        torch.set_flush_denormal(False)
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert re.search(sentence, text), text


def test_different_data_and_different_atoms_are_refused(home: Path, tmp_path: Path) -> None:
    from fairchem_kd.analysis.compare.comparison import Group, compare
    from fairchem_kd.analysis.compare.runs import _splits
    from fairchem_kd.analysis.subjects.runs import ModelFile

    plain, other = read_model(run_of("plain-s0")), read_model(run_of("plain-s1"))
    changed = {**other.config, "test_dataset": {"format": "lmdb", "src": "data/val"}}
    with pytest.raises(UserError, match=r"different data \(data/test, .*; data/val.*--split"):
        _splits([], [plain.config, changed])
    outputs = copy.deepcopy(dict(other.config["outputs"]))
    outputs["forces"]["eval_on_free_atoms"] = False
    whole = ModelFile(other.path, {**other.config, "outputs": outputs})
    with pytest.raises(UserError, match="--atoms free or --atoms all"):
        compare([Group("a", [plain]), Group("b", [whole])], {})


def test_splits_without_labels_or_structures(home: Path, tmp_path: Path) -> None:
    bare = write_lmdb(tmp_path / "bare", 2, seed=0, energy=lambda *_: None)
    with pytest.raises(UserError, match="has no energies"), open_split({"src": str(bare)}):
        pass
    forceless = write_lmdb(tmp_path / "forceless", 2, seed=0, forces=lambda *_: None)
    model = load_model(read_model("teacher.pt"))
    with (
        open_split({"src": str(forceless)}) as split,
        pytest.raises(UserError, match="has no forces"),
    ):
        evaluate(model, split)
    strange = write_lmdb(
        tmp_path / "strange", 2, seed=0, atomic_numbers=lambda z, _: torch.full_like(z, 115.0)
    )
    with open_split({"src": str(strange)}) as split, pytest.raises(UserError, match="holds Mc"):
        evaluate(model, split)


def test_plots_ask_for_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["compare", "teacher.pt", "--out", "never"]) == 2
    assert "pip install 'fairchem-kd[plots]'" in capsys.readouterr().err
    assert not Path("never").exists()
