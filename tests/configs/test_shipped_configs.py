"""Every config in yaml_configs/kd, demo and teachers: it is read, and its two models fit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import ROOT, read
from configs import in_root as in_root
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

from fairchem_kd.data.recipes.registry import parse_options
from fairchem_kd.data.splits import QUARTERS
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.features import FeatureExtractor
from fairchem_kd.models.frozen import Teacher

RUNS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("kd", "demo", "teachers")
    for path in (ROOT / "yaml_configs" / folder).rglob("*.yml")
    if path.parent.name != "base"
)
#: Frames that each folder holds; the quarters end with a whole trajectory.
FRAMES = {
    "data/slabs/train": 3000,
    "data/slabs/train_1of4": 750,
    "data/collisions/train": 4000,
    "data/collisions_16k/train": 16000,
    "data/collisions/train_1of4": 1002,
}


def labelled(train: dict[str, Any]) -> int:
    """How many structures the student has labels of."""
    return train.get("first_n", FRAMES[train["src"]])


@functools.cache
def teacher(path: str) -> Teacher:
    return Teacher.from_checkpoint(path)


@functools.cache
def _model(text: str) -> Any:
    settings = yaml.safe_load(text)
    name = settings.pop("name")
    return registry.get_model_class(name)(**settings)


def model(config: dict[str, Any]) -> Any:
    setup_imports()
    settings = {k: v for k, v in config["model"].items() if k != "scale_file"}
    return _model(yaml.safe_dump(settings))


@pytest.mark.parametrize("path", RUNS)
def test_steps_of_the_schedule_are_those_of_the_run(path: str) -> None:
    config = read(path)
    train, optim = config["dataset"]["train"], config["optim"]
    steps = -(-labelled(train) // optim["batch_size"]) * optim["max_epochs"]
    assert optim["T_max"] == steps
    assert steps % optim["eval_every"] == 0  # the last validation sees the last step
    for split in config["dataset"].values():
        # fairchem hands train's first_n down to the others unless told not to
        assert "first_n" not in train or split is train or not split["use_train_settings"]
        recipe = parse_options(split["build"], path).recipe
        assert Path(split["src"]).name in (*recipe.sizes, *QUARTERS.values())


@pytest.mark.parametrize("path", RUNS)
def test_every_term_finds_its_features_in_both_models(path: str) -> None:
    config = read(path)
    distillation = parse_distillation(config.get("task"))
    student = model(config)
    for term in distillation.active_terms.values():
        taught = teacher(distillation.teacher.checkpoint)
        FeatureExtractor(student, term.student_requests())
        FeatureExtractor(taught.model, term.teacher_requests())
        taught.require_outputs(term.needs_outputs)
    if distillation.unlabelled is not None:
        data = distillation.unlabelled.dataset
        train = config["dataset"]["train"]
        assert train["src"] == f"{data['src']}_1of4"  # train begins with them
        assert distillation.unlabelled.skip == labelled(train)


def test_runs_with_the_same_labels_share_their_normaliser() -> None:
    """It is of those labels alone, so that losses have one scale and no label leaks."""
    found: dict[str, Any] = {}
    for path in RUNS:
        train = read(path)["dataset"]["train"]
        given = train["transforms"]["normalizer"]
        key = f"{train['src']} {train.get('first_n', '')}".strip()
        assert found.setdefault(key, given) == given, path
    assert found["data/slabs/train"] != found["data/slabs/train_1of4"]
    assert found["data/collisions/train"] != found["data/collisions/train_1of4 252"]
