"""Files of numbers that a config names: read as what they are, or one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import pytest
import torch
import yaml
from trainings import config, write_splits, write_yaml

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.errors import UserError
from fairchem_kd.stock.named_files import check_loadable, check_units

NEW = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
OLD = pytest.mark.skipif(not NEW, reason="before torch 2.6 fairchem unpickles what a config names")
WHERE = "dataset.train.transforms.element_references"


class Canary:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def write(folder: Path) -> None:
    (folder / "canary.pt").write_bytes(pickle.dumps(Canary()))
    (folder / "text.pt").write_text("hello")
    torch.save({"element_references": torch.ones(3)}, folder / "good.pt")
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:200])
    np.savez(folder / "good.npz", element_references=np.ones(3))
    np.savez(folder / "old.npz", coeff=np.ones(3))
    np.savez(folder / "none.npz", other=np.ones(3))
    np.savez(folder / "canary.npz", coeff=np.array([Canary()], dtype=object))
    np.savez(folder / "nan.npz", coeff=np.array([1.0, np.nan]))
    np.savez(folder / "table.npz", coeff=np.ones((3, 3)))
    np.savez(folder / "words.npz", coeff=np.array(["a"]))
    (folder / "text.npz").write_text("hello")
    (folder / "a.txt").write_text("1 2 3")


NAMES = (
    *(pytest.param(name, marks=OLD) for name in ("canary.pt", "text.pt", "cut.pt")),
    *("none.npz", "canary.npz", "nan.npz", "table.npz", "words.npz", "text.npz"),
    *("a.txt", "nowhere.pt", ".", 3, ["good.pt"]),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_none_is_a_sentence(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match=rf"{WHERE}\.energy\.file"):
        check_units({"energy": {"file": name}}, WHERE)
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["good.pt", "good.npz", "old.npz"])
def test_what_is_one_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    check_units({"energy": {"file": name}}, WHERE)
    check_units({"fit": {"targets": ["energy"]}}, WHERE)
    check_units(None, WHERE)
    check_loadable(name, "model.scale_file")


@OLD
@pytest.mark.parametrize("key", ["normalizer", "element_references", "scale_file"])
def test_a_training_refuses_them(key: str, tmp_path: Path) -> None:
    write(tmp_path)
    write_splits(tmp_path / "data", train=(6, 0), val=(2, 50))
    path = write_yaml(tmp_path / "run.yml", config(Path(), Path("data")))
    contents = yaml.safe_load(path.read_text())
    if key == "scale_file":
        contents["model"][key] = "canary.pt"
    else:
        contents["dataset"]["train"]["transforms"] = {key: {"file": "canary.pt"}}
    path.write_text(yaml.safe_dump(contents))
    argv = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu"]
    attacks.run(argv, tmp_path, fairchem).sentence(key, "canary.pt cannot be read")
    assert not (tmp_path / "canary").exists()
