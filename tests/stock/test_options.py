"""The stock part of a training's config: what is wrong is one sentence, before anything starts."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import ROOT
from fuzz import chance, rounds
from trainings import inside

from fairchem_kd.errors import UserError
from fairchem_kd.launch.config import make_parser, read_config
from fairchem_kd.launch.run import main
from fairchem_kd.stock.options import check_training_config

GOOD: dict[str, Any] = {
    "trainer": "fairchem_kd.DistillationTrainer",
    "logger": "tensorboard",
    "model": {"name": "painn", "hidden_channels": 16, "num_layers": 2, "cutoff": 5.0,
              "max_neighbors": 20, "otf_graph": True},
    "outputs": {"energy": {"level": "system"}, "forces": {"level": "atom"}},
    "loss_functions": [{"energy": {"fn": "mae", "coefficient": 1}},
                       {"forces": {"fn": "l2mae", "coefficient": 10}}],
    "evaluation_metrics": {"metrics": {"energy": ["mae"], "forces": ["mae"]},
                           "primary_metric": "forces_mae"},
    "dataset": {
        "train": {"format": "lmdb", "src": "data/train", "transforms": {"normalizer": {
            "energy": {"mean": 5.0, "rmsd": 2.0}, "forces": {"mean": 0.0, "rmsd": 1.5}}}},
        "val": {"src": "data/val"},
    },
    "optim": {"batch_size": 4, "num_workers": 0, "max_epochs": 1, "eval_every": 2,
              "lr_initial": 1e-3, "optimizer": "AdamW", "scheduler": "CosineAnnealingLR",
              "T_max": 10, "ema_decay": 0.9, "clip_grad_norm": 10.0},
    "task": {},
}  # fmt: skip
GONE = "(not given)"

#: Key, value (GONE: taken out), and what the sentence says.
BAD: list[tuple[str, Any, str]] = [
    *[("optim.batch_size", value, r"optim\.batch_size") for value in (0, -1, "four", None, 2.5)],
    ("optim.eval_batch_size", 0, r"eval_batch_size must be at least 1"),
    *[("optim.max_epochs", value, r"optim\.max_epochs") for value in ("many", 0, -1, GONE, None)],
    *[
        ("optim.lr_initial", value, r"optim\.lr_initial")
        for value in (GONE, "fast", float("nan"), 0, -1e-3, None, "inf")
    ],
    ("optim.optimizer", "AdamQ", r"cannot be 'AdamQ' \(did you mean"),
    ("optim.optimizer", "lr_scheduler", r"optim\.optimizer cannot be"),
    ("optim.scheduler", "CosineAnealingLR", r"did you mean 'CosineAnnealingLR'"),
    ("optim.scheduler", GONE, r"optim\.scheduler is missing"),
    ("optim.T_max", GONE, r"CosineAnnealingLR needs optim\.T_max"),
    ("optim.T_max", "soon", r"optim\.T_max must be a whole number"),
    ("optim.clip_grad_norm", -1, r"clip_grad_norm must be greater than 0"),
    ("optim.ema_decay", 2, r"ema_decay must be below 1"),
    ("optim.ema_decay", "slow", r"ema_decay must be a number"),
    ("optim.eval_every", 0, r"eval_every must be at least 1"),
    ("optim.eval_every", "often", r"eval_every must be a whole number"),
    ("optim.num_workers", -1, r"num_workers must be at least 0"),
    ("optim.max_epoch", 3, r"unknown key 'max_epoch' \(did you mean"),
    ("optim.weight_decay", -1, r"weight_decay must be at least 0"),
    ("optim.optimizer_params", "amsgrad", r"optimizer_params must be a mapping"),
    ("optim.optimizer_params", {"eps": float("nan")}, r"optimizer_params\.eps"),
    ("optim", [1], r"optim must be a mapping"),
    ("model", "painn", r"model"),
    ("model.name", GONE, r"model\.name is required"),
    ("model.name", "pain", r"cannot be 'pain' \(did you mean 'painn'"),
    ("model.name", 3, r"model\.name must be a name"),
    *[("model.hidden_channels", value, r"hidden_channels") for value in (0, -4)],
    *[
        ("model.cutoff", value, r"model\.cutoff must be")
        for value in (0, -1.0, float("nan"), float("inf"), "far")
    ],
    ("model.max_neighbors", 0, r"max_neighbors must be greater than 0"),
    ("model.scale_file", "nowhere.json", r"scale_file: .*nowhere\.json does not exist"),
    ("model.scale_file", {"a": float("nan")}, r"scale_file\.a is nan"),
    ("dataset.train.src", 5, r"dataset\.train\.src must be a path"),
    ("dataset.train.src", GONE, r"dataset\.train\.src is required"),
    ("dataset.train.src", [], r"dataset\.train\.src must be"),
    ("dataset.train.format", "lmbd", r"cannot be 'lmbd' \(did you mean 'lmdb'"),
    ("dataset.train.first_n", "some", r"first_n must be a whole number"),
    ("dataset.train.first_n", -5, r"first_n must be at least 1"),
    ("dataset.train.frist_n", 5, r"unknown key 'frist_n' \(did you mean 'first_n'"),
    ("dataset.val", "data/val", r"dataset\.val must be a mapping"),
    ("dataset.train.transforms.normalizer", "fit", r"normalizer must be a mapping"),
    ("dataset.train.transforms.normalizer.energy", {"mean": 0, "std": 2}, r"'std' .*'rmsd'"),
    ("dataset.train.transforms.normalizer.energy", {"mean": 0}, r"needs mean and rmsd"),
    ("dataset.train.transforms.normalizer.energy.rmsd", 0, r"rmsd must be greater than 0"),
    ("dataset.train.transforms.normalizer.energy.mean", float("nan"), r"mean must be a number"),
    ("dataset.train.transforms.normalizer.energy.mean", "low", r"mean must be a number"),
    ("outputs", GONE, r"outputs is missing"),
    ("outputs", {}, r"outputs is missing"),
    ("outputs.forces.level", "atoms", r"cannot be 'atoms' \(did you mean 'atom'"),
    ("loss_functions", [], r"loss_functions is empty"),
    ("loss_functions", GONE, r"loss_functions is empty"),
    ("loss_functions", {"energy": {"fn": "mae", "coefficient": 1}}, r"must be a list"),
    ("loss_functions", [{"energy": {"fn": "maee", "coefficient": 1}}], r"'maee'"),
    ("loss_functions", [{"energy": {"fn": "mae"}}], r"energy\.coefficient is required"),
    ("loss_functions", [{"energy": {"fn": "mae", "coefficient": "much"}}], r"must be a number"),
    ("loss_functions", [{"energy": {"fn": "mae", "coefficient": float("nan")}}], r"a number"),
    ("loss_functions", [{"enery": {"fn": "mae", "coefficient": 1}}], r"no 'enery' \(did you"),
    ("loss_functions", ["energy"], r"loss_functions\[0\] must be a mapping"),
    ("evaluation_metrics.metrics.forces", ["mae", "maee"], r"cannot be 'maee' \(did you mean"),
    ("evaluation_metrics.metrics.force", ["mae"], r"outputs has no 'force'"),
    ("evaluation_metrics.primary_metric", "force_mae", r"primary_metric is 'force_mae'"),
    ("evaluation_metrics.primary_metrics", "forces_mae", r"unknown key 'primary_metrics'"),
    ("logger", "tensorbord", r"cannot be 'tensorbord' \(did you mean 'tensorboard'"),
    ("task", "train", r"task"),
]

#: What stock understands, or we do in its place, and must not be refused.
FINE: list[tuple[str, Any]] = [
    ("optim.lr_initial", "1e-3"),
    ("optim.num_workers", GONE),
    ("optim.scheduler", None),
    ("optim.scheduler", "Null"),
    ("optim.eval_every", GONE),
    ("optim.clip_grad_norm", None),
    ("optim.ema_decay", None),
    ("optim.ema_decay", 0),
    ("optim.optimizer_params", {"amsgrad": True, "weight_decay": "1e-4"}),
    ("optim.something_of_my_own", 3),
    ("model.something_of_my_own", 3),
    ("my_notes", "anything"),
    ("dataset.train.src", ["data/a", "data/b"]),
    ("dataset.train.first_n", None),
    ("dataset.val", None),
    ("evaluation_metrics", GONE),
    ("evaluation_metrics.metrics.misc", ["energy_forces_within_threshold"]),
    ("logger", None),
    ("logger", {"name": "tensorboard"}),
    ("checkpoint_every", -1),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(GOOD)
    tree, names = config, key.split(".")
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    if value is GONE:
        tree.pop(names[-1], None)
    else:
        tree[names[-1]] = value
    return config


def read(folder: Path, config: Any, *overrides: str) -> dict[str, Any]:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["--mode", "train", "--config-yml", str(path)]
    args: argparse.Namespace = make_parser().parse_args(arguments)
    made = read_config(args, list(overrides))
    check_training_config(made)
    return made


@pytest.mark.parametrize(("key", "value", "said"), BAD, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_one_sentence(tmp_path: Path, key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        read(tmp_path, changed(key, value))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1500


@pytest.mark.parametrize(("key", "value"), FINE, ids=lambda v: str(v)[:40])
def test_what_stock_takes_is_taken(tmp_path: Path, key: str, value: Any) -> None:
    read(tmp_path, changed(key, value))


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    config = changed("optim.lr_initial", "1e-3")
    config["optim"]["optimizer_params"] = {"weight_decay": "1e-4"}
    config["optim"]["ema_decay"] = 0
    made = read(tmp_path, config)["optim"]
    assert made["lr_initial"] == 1e-3
    assert made["optimizer_params"] == {"weight_decay": 1e-4}
    assert made["ema_decay"] == 0.0
    assert isinstance(made["ema_decay"], float)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--optim.max_epoch=1", r"unknown key 'max_epoch'"),
        ("--foo.bar=1", r"overrides a key of 'foo', which no config has"),
        ("--optm.max_epochs=1", r"'optm'.*did you mean 'optim'"),
        ("--optim.lr_initial=", r"needs a key and a value"),
        ("--optim.lr_initial=inf", r"optim\.lr_initial must be a number"),
        ("--=1", r"which no config has|needs a key"),
        ("--optim.batch_size=0", r"batch_size must be at least 1"),
    ],
)
def test_overrides_are_checked_as_well(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-gpus", "0"], "--num-gpus must be at least 1"),
        (["--print-every", "0"], "--print-every must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--num-nodes", "0"], "--num-nodes must be at least 1"),
        (["--mode", "predict"], "--mode predict needs --checkpoint"),
        (["--mode", "validate"], "--mode validate needs --checkpoint"),
    ],
)
def test_flags_are_checked(
    tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(GOOD))
    with inside(tmp_path):
        assert main(["--mode", "train", "--config-yml", "config.yml", *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_mode_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(GOOD))
    with inside(tmp_path):
        assert main(["--config-yml", "config.yml"]) == 2
    assert "--mode is required: train, validate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "key"), [("no.pt", "checkpoint"), (["here.pt", "no.pt"], "checkpoint[1]")]
)
def test_a_teacher_that_is_missing_is_told_before_data_are_built(
    tmp_path: Path, checkpoint: Any, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(GOOD)
    config["dataset"]["train"]["build"] = {"recipe": "slabs"}
    config["task"] = {
        "distillation": {"teacher": {"checkpoint": checkpoint}, "losses": {"vanilla": {}}}
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "here.pt").write_bytes(b"some checkpoint")
    with inside(tmp_path):
        assert main(["--mode", "train", "--config-yml", "config.yml"]) == 2
    said = capsys.readouterr().err
    assert f"task.distillation.teacher.{key}: The checkpoint no.pt does not exist" in said
    assert not (tmp_path / "data").exists()


PARTS = {
    "data",
    "models",
    "sweeps",
    "base",
    "scales",
    "optim",
    "data.yml",
    "painn.yml",
    "painn_small.yml",
}
SHIPPED = [
    path
    for path in sorted((ROOT / "yaml_configs").rglob("*.yml"))
    if not PARTS & {*path.relative_to(ROOT / "yaml_configs").parts}
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "yaml_configs")))
def test_what_ships_is_taken(path: Path) -> None:
    with inside(ROOT):
        args = make_parser().parse_args(["--mode", "train", "--config-yml", str(path)])
        check_training_config(read_config(args, []))


def test_whatever_stands_in_a_config_is_taken_or_refused(tmp_path: Path) -> None:
    """Seeded: values of any kind anywhere end in a config or in one sentence."""
    luck, keys = chance(), []
    values = [None, 0, -1, 10**12, float("nan"), "", "a.b", [], {}, [[]], {"a": {}}, True, "null"]

    def walk(tree: Any, path: str) -> None:
        for name, inner in tree.items():
            keys.append(f"{path}{name}")
            if isinstance(inner, dict):
                walk(inner, f"{path}{name}.")

    walk(GOOD, "")
    refused = 0
    for _ in range(rounds(300)):
        try:
            read(tmp_path, changed(luck.choice(keys), luck.choice(values)))
        except UserError:
            refused += 1
    assert 0.5 * rounds(300) < refused < rounds(300)
