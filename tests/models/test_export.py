"""Exported checkpoints: the best weights, no trace of the machine, and a card."""

from __future__ import annotations

import argparse
import copy
import getpass
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.trainers import OCPTrainer
from models import batch, fit_scales, structures
from trainings import config, trainer, write_lmdb

from fairchem_kd.commands import export as command
from fairchem_kd.errors import UserError
from fairchem_kd.models import export
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.models.frozen import Teacher

# fairchem's loaders ask for pinned memory, with a GPU or without
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

OUTPUTS = ("energy", "forces")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder: data/toy with a card, and a stock run of GemNet-OC with EMA."""
    root = tmp_path_factory.mktemp("project")
    for seed, (split, count) in enumerate({"train": 6, "val": 4, "test_ood": 3}.items()):
        write_lmdb(root / "data" / "toy" / split, count, seed=10 * seed)
    card = {"elements": [1, 8, 29, 78], "options": {"recipe": "toy"}, "splits": {"big": 1}}
    (root / "data" / "toy" / "card.json").write_text(json.dumps(card))
    arguments = config(root / "runs", root / "data" / "toy", model="gemnet_oc")
    arguments["slurm"] = {"folder": str(root / "logs"), "slurm_account": "someones-account"}
    arguments["logger"] = {"name": "tensorboard", "entity": "some-person"}
    with trainer(arguments, OCPTrainer) as built:
        fit_scales(built.model)
        built.load_extras()
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        built.save(checkpoint_file="last.pt", training_state=False)  # averaged, of the last step
        built.save(checkpoint_file="checkpoint.pt")
    shutil.move(folder, root / "run")
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def _run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def exported(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("exported") / "toy.pt"
    before = os.getcwd()
    os.chdir(home)
    try:
        assert _run("run/checkpoint.pt", dest, "--data", "data/toy") == 0
    finally:
        os.chdir(before)
    return dest


def test_averaged_weights_and_nothing_of_the_training(home: Path, exported: Path) -> None:
    averaged = torch.load(home / "run" / "last.pt", weights_only=False)
    raw = torch.load(home / "run" / "checkpoint.pt", weights_only=False)
    contents = torch.load(exported, weights_only=True)  # plain tensors and values alone
    assert contents.keys() == {
        "state_dict", "normalizers", "elementrefs", "config", "val_metrics", "amp",
    }  # fmt: skip
    assert contents["state_dict"].keys() == averaged["state_dict"].keys()
    for name, value in averaged["state_dict"].items():
        assert torch.equal(contents["state_dict"][name], value), name
    weight = "out_energy.linear.weight"
    assert not torch.equal(contents["state_dict"][weight], raw["state_dict"][weight])
    assert exported.stat().st_size < (home / "run" / "last.pt").stat().st_size + 5000


def test_no_trace_of_the_machine_or_its_user(home: Path, exported: Path) -> None:
    user = getpass.getuser()
    hidden = [str(home), str(Path.home()) + "/", f"/{user}/", "someones-account", "some-person"]
    assert str(home).encode() in (home / "run" / "checkpoint.pt").read_bytes()
    for path in (exported, exported.with_suffix(".json")):
        contents = path.read_bytes()
        for text in hidden:
            assert text.encode() not in contents, text
    settings = read_checkpoint(exported)["config"]
    assert settings["dataset"]["src"] == "data/toy/train"
    assert settings["val_dataset"]["src"] == "data/toy/val"
    assert settings["cmd"]["checkpoint_dir"].startswith("runs/checkpoints/")
    assert settings["slurm"] == {}
    assert settings["logger"] == "tensorboard"


def test_paths_become_relative(tmp_path: Path) -> None:
    roots = [tmp_path, tmp_path.parent]
    assert export._relative(str(tmp_path / "a" / "b"), roots) == "a/b"
    assert export._relative(str(tmp_path.parent / "x"), roots) == "x"
    assert export._relative("/mnt/disk/oc20/train", roots) == "oc20/train"
    assert export._relative("C:\\Users\\me\\oc20\\train", roots) == "oc20/train"
    assert export._relative("data/slabs", roots) == "data/slabs"
    assert export._relative("mae", roots) == "mae"


def _calculated(path: Path) -> list[dict[str, Any]]:
    logging.disable(logging.INFO)
    try:
        calculator = OCPCalculator(checkpoint_path=path, cpu=True, seed=0)
    finally:
        logging.disable(logging.NOTSET)
    results = []
    for atoms in structures():
        calculator.calculate(atoms, OUTPUTS, None)
        results.append(copy.deepcopy(calculator.results))
    return results


def test_the_stock_calculator_loads_it(home: Path, exported: Path) -> None:
    safe = home / "run" / "last.pt"
    for ours, stock in zip(_calculated(exported), _calculated(safe), strict=True):
        assert ours["energy"] == stock["energy"]
        np.testing.assert_array_equal(ours["forces"], stock["forces"])


def test_weights_that_are_not_finite_are_not_exported(home: Path, tmp_path: Path) -> None:
    contents = read_checkpoint("run/last.pt")
    key = next(key for key, weight in contents["state_dict"].items() if weight.dim() == 2)
    contents["state_dict"][key][0, 0] = float("nan")
    write_checkpoint(contents, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"nan\.pt are not finite"):
        _run(tmp_path / "nan.pt", tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt"]


def test_the_teacher_is_the_same(home: Path, exported: Path) -> None:
    """Its elements come from its card, so that nothing has to be said in the config."""
    ours = Teacher.from_checkpoint(exported)
    theirs = Teacher.from_checkpoint(home / "run" / "checkpoint.pt", elements=["H"])
    assert ours.elements == {1, 8, 29, 78}
    structs = batch()
    left, right = (t.denormalized(t.forward(structs), structs) for t in (ours, theirs))
    for name in OUTPUTS:
        assert torch.equal(left[name], right[name])


def test_it_can_be_validated_and_fine_tuned(home: Path, exported: Path, tmp_path: Path) -> None:
    """As stock's --mode validate and --checkpoint do; the errors are those on the card."""
    arguments = config(tmp_path, home / "data" / "toy", model="gemnet_oc")
    with trainer(arguments, OCPTrainer) as built:
        built.load_checkpoint(str(exported))
        metrics = built.validate(split="val", disable_tqdm=True)
        card = json.loads(exported.with_suffix(".json").read_text())
        for name, value in card["metrics"]["val"].items():
            assert metrics[name]["metric"] == pytest.approx(value, rel=1e-5, abs=1e-6)
        built.train(disable_eval_tqdm=True)


def test_the_card(home: Path, exported: Path) -> None:
    card = json.loads(exported.with_suffix(".json").read_text())
    assert card["elements"] == ["H", "O", "Cu", "Pt"]
    assert card["data"] == {"options": {"recipe": "toy"}}
    assert card["metrics"].keys() == {"val", "test_ood"}
    assert card["training_seconds"] > 0
    assert card["versions"]["fairchem-core"].startswith("1.")
    assert card["model"] == card["config"]["model"]["name"] == "gemnet_oc"
    assert "scale_file" not in card["config"]["model"]
    teacher = Teacher.from_checkpoint(exported)
    assert card["parameters"] == sum(p.numel() for p in teacher.model.parameters())


def test_the_errors_on_the_card_by_hand(home: Path, exported: Path) -> None:
    """Mean absolute errors over systems, and over the components of free atoms."""
    from fairchem.core.datasets import LmdbDataset, data_list_collater

    samples = list(LmdbDataset({"src": str(home / "data" / "toy" / "test_ood")}))
    structs = data_list_collater(samples, otf_graph=True)
    teacher = Teacher.from_checkpoint(exported)
    found = teacher.denormalized(teacher.forward(structs), structs)
    energy = (found["energy"] - structs.energy).double().abs().mean()
    free = structs.fixed == 0
    assert 0 < free.sum() < len(free)
    forces = (found["forces"] - structs.forces)[free].double().abs().mean()
    card = json.loads(exported.with_suffix(".json").read_text())["metrics"]["test_ood"]
    assert card["energy_mae"] == pytest.approx(float(energy), rel=1e-4)
    assert card["forces_mae"] == pytest.approx(float(forces), rel=1e-4)


def test_elements_may_be_given(tmp_path: Path) -> None:
    _run("run/last.pt", tmp_path / "t.pt", "--elements", "Cu", "1", "Cu", "--no-metrics")
    card = json.loads((tmp_path / "t.json").read_text())
    assert card["elements"] == ["H", "Cu"]
    assert card["metrics"] == {}


def test_the_card_beside_the_training_data_is_found(tmp_path: Path) -> None:
    _run("run/last.pt", tmp_path / "t.pt")
    assert json.loads((tmp_path / "t.json").read_text())["elements"] == ["H", "O", "Cu", "Pt"]


def test_a_runs_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    _run("run", tmp_path / "t.pt", "--no-metrics")
    _run("run/best_checkpoint.pt", tmp_path / "same.pt", "--no-metrics")
    found, same = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("t.pt", "same.pt"))
    assert all(torch.equal(found[name], value) for name, value in same.items())
    with pytest.raises(UserError, match="has neither best_checkpoint"):
        _run(tmp_path, tmp_path / "none.pt")


def test_unknown_elements_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    contents = read_checkpoint("run/last.pt")
    contents["config"]["dataset"]["src"] = "elsewhere/train"
    path = write_checkpoint(contents, tmp_path / "c.pt")
    with caplog.at_level(logging.WARNING):
        _run(path, tmp_path / "t.pt")
    assert "will not say which elements" in caplog.text
    assert json.loads((tmp_path / "t.json").read_text())["elements"] is None


def test_a_wrapper_is_exported_as_its_stock_model(tmp_path: Path) -> None:
    contents = read_checkpoint("run/last.pt")
    contents["config"]["model"] |= {"name": "gemnet_oc_kd", "features": ["node"]}
    contents["config"]["model"]["scale_file"] = "/nowhere/scales.json"
    _run(write_checkpoint(contents, tmp_path / "c.pt"), tmp_path / "t.pt")
    model = read_checkpoint(tmp_path / "t.pt")["config"]["model"]
    assert model["name"] == "gemnet_oc"
    assert not {"features", "scale_file"} & model.keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("run/last.pt", "t.bin"), r"has to end in \.pt, and t\.bin does not"),
        (("run/none.pt", "t.pt"), "does not exist"),
        (("run/last.pt", "t.pt", "--data", "data/none"), "is not a folder"),
        (("run/last.pt", "t.pt", "--elements", "Xx"), "'Xx', which is no chemical element"),
    ],
)
def test_what_cannot_be_exported_is_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _run(*more)
    assert not Path("t.pt").exists()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    dest = tmp_path / "t.pt"
    dest.with_suffix(".json").write_text("mine")
    with pytest.raises(UserError, match="give --force"):
        _run("run/last.pt", dest)
    assert not dest.exists()
    assert _run("run/last.pt", dest, "--force") == 0
    assert dest.is_file()


def test_a_model_without_scale_factors_is_exported_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A PaiNN student trains well without them; only a teacher has to have them."""
    contents = read_checkpoint("run/last.pt")
    name = next(k for k in contents["state_dict"] if k.endswith(".scale_factor"))
    contents["state_dict"][name].zero_()
    with caplog.at_level(logging.WARNING):
        _run(write_checkpoint(contents, tmp_path / "c.pt"), tmp_path / "t.pt")
    assert "cannot be a teacher" in caplog.text
    with pytest.raises(UserError, match="unfitted scale factors"):
        Teacher.from_checkpoint(tmp_path / "t.pt")
