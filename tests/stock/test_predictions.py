"""Every structure has its prediction, and all of its digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import config, trainer, write_lmdb
from trainings import data as data

from fairchem_kd.errors import UserError
from fairchem_kd.stock.predictions import apart, in_single_precision, keep_all_predictions
from fairchem_kd.stock.relaxation import take_optimizer_name


@pytest.mark.parametrize(
    ("given", "unique"),
    [
        (["a", "b"], ["a", "b"]),
        (["0_0", "1_0", "0_0", "0_0"], ["0_0", "1_0", "0_0#2", "0_0#3"]),
        (["a", "a#2", "a"], ["a", "a#2", "a#3"]),
        ([], []),
    ],
)
def test_equal_ids_are_told_apart(given: list[str], unique: list[str]) -> None:
    assert apart(given) == unique


def test_a_set_of_several_lmdbs_numbered_from_0_is_predicted_whole(
    tmp_path: Path, data: Path
) -> None:
    keep_all_predictions()
    folder = write_lmdb(tmp_path / "test", 3, seed=20)
    (folder / "data.0000.lmdb").rename(folder / "data.0001.lmdb")
    other = write_lmdb(tmp_path / "other", 3, seed=60)
    (other / "data.0000.lmdb").rename(folder / "data.0000.lmdb")
    (folder / "metadata.npz").unlink()
    given = config(tmp_path, data)
    given["dataset"]["test"] = {"format": "lmdb", "src": str(folder)}
    assert in_single_precision(given)
    with trainer(given) as built:
        built.predict(built.test_loader, results_file="predictions", disable_tqdm=True)
    (path,) = tmp_path.glob("results/*/*.npz")
    found = np.load(path)
    assert len(found["energy"]) == len(set(found["ids"].tolist())) == 6
    assert found["energy"].dtype == np.float32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, False),
        ({"task": None, "outputs": {"energy": {"level": "system"}}}, False),
        ({"task": {"prediction_dtype": "float16"}}, True),
        ({"outputs": {"energy": {"prediction_dtype": "float16"}}}, True),
    ],
)
def test_predictions_are_in_single_precision_unless_a_config_says(
    given: dict[str, Any], said: bool
) -> None:
    before = {**given}
    assert in_single_precision(given) is not said
    if said:
        assert given == before
    else:
        assert given["task"]["prediction_dtype"] == "float32"


def test_the_options_of_a_relaxation() -> None:
    given = {"task": {"relax_opt": {"name": "LBFGS", "memory": 50}}}
    take_optimizer_name(given)
    assert given["task"]["relax_opt"] == {"memory": 50}
    with pytest.raises(UserError, match=r"relax_opt\.name is 'fire'"):
        take_optimizer_name({"task": {"relax_opt": {"name": "fire"}}})
    with pytest.raises(UserError, match=r"task\.relax_opt is missing"):
        take_optimizer_name({"task": {}})
