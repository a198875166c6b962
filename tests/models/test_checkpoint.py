"""Reading checkpoints without executing code, and writing them whole."""

from __future__ import annotations

import collections
import os
import pathlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import config, trainer, write_lmdb

from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint, write_checkpoint

# fairchem's loaders ask for pinned memory, with a GPU or without
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


def _contents(**extra: Any) -> dict[str, Any]:
    return {
        "state_dict": collections.OrderedDict(w=torch.arange(3.0)),
        "config": {"model": {"name": "painn"}},
        **extra,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a short run of stock fairchem."""
    root = tmp_path_factory.mktemp("run")
    write_lmdb(root / "data" / "train", 6, seed=0)
    write_lmdb(root / "data" / "val", 4, seed=9)
    arguments = config(root, root / "data", eval_every=2)
    with trainer(arguments, OCPTrainer) as built:
        built.train(disable_eval_tqdm=True)
        return Path(built.config["cmd"]["checkpoint_dir"])


@pytest.mark.parametrize("name", ["checkpoint.pt", "best_checkpoint.pt"])
def test_stock_checkpoints_are_read_as_torch_reads_them(run: Path, name: str) -> None:
    ours = read_checkpoint(run / name)
    stock = torch.load(run / name, weights_only=False)
    assert ours.keys() == stock.keys()
    assert ours["config"] == stock["config"]
    assert ours["val_metrics"] == stock["val_metrics"]
    for key, value in stock["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value)
    if name == "checkpoint.pt":
        assert ours["ema"]["decay"] == 0.9
        assert ours["scheduler"] == stock["scheduler"]


class _Payload:
    """What a malicious checkpoint would hold."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, old_format: bool) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save(
        _contents(payload=_Payload(target)), path, _use_new_zipfile_serialization=not old_format
    )
    with pytest.raises(UserError, match=r"posix\.mkdir.*trust_checkpoint: true"):
        read_checkpoint(path)
    assert not target.exists()
    read_checkpoint(path, trust=True)  # the one way round; shows that the payload was alive
    assert target.is_dir()


@pytest.mark.parametrize(
    "model",
    [
        {"name": "torch.hub.load", "repo_or_dir": "x"},
        {"name": "hydra", "backbone": {"model": "torch.hub.load"}},
        {"name": "hydra", "heads": {"energy": {"module": "torch.hub.load"}}},
        "torch.hub.load",
    ],
)
def test_a_model_named_by_an_import_path_is_not_imported(tmp_path: Path, model: Any) -> None:
    contents = {"state_dict": {"a": torch.ones(1)}, "config": {"model": model}}
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"import path, 'torch\.hub\.load'.*trust_checkpoint: true"):
        read_checkpoint(tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt", trust=True)["config"]["model"] == model


def test_plain_values_of_other_types_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    values = {
        "float": np.float64(0.25),
        "half": np.float16(0.5),
        "int": np.int64(-7),
        "bool": np.bool_(True),
        "path": pathlib.PurePosixPath("a/b"),
        "posix": Path("runs") / "x",
        "counts": collections.defaultdict(int, a=1),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    torch.save(_contents(values=values), path)
    read = read_checkpoint(path)["values"]
    assert read["float"] == 0.25
    assert type(read["float"]) is float
    assert (read["half"], read["int"], read["bool"]) == (0.5, -7, True)
    assert (read["path"], read["posix"]) == ("a/b", os.path.join("runs", "x"))
    assert read["counts"] == {"a": 1}
    assert (read["device"], read["dtype"]) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_scalars_of_numpy_1_and_2_are_read(tmp_path: Path, core: str) -> None:
    path = tmp_path / "c.pt"
    torch.save(_contents(mae=np.float64(0.125)), path, _use_new_zipfile_serialization=False)
    held = "numpy._core" if b"numpy._core" in path.read_bytes() else "numpy.core"
    path.write_bytes(path.read_bytes().replace(held.encode(), f"numpy.{core}".encode()))
    assert read_checkpoint(path)["mae"] == 0.125


def test_numpy_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(_contents(values=np.array([{"a": 1}], dtype=object)), path)
    with pytest.raises(UserError, match="trust_checkpoint"):
        read_checkpoint(path)


def test_the_allow_list_does_not_outlive_the_read(run: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(run / "checkpoint.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.pt does not exist; relative paths start from"):
        read_checkpoint(tmp_path / "no.pt")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(run: Path, tmp_path: Path, share: float) -> None:
    whole = (run / "checkpoint.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="is truncated"):
        read_checkpoint(path)


@pytest.mark.parametrize("trust", [False, True])
def test_a_damaged_file_is_refused(run: Path, tmp_path: Path, trust: bool) -> None:
    whole = bytearray((run / "checkpoint.pt").read_bytes())
    start = whole.index(b"data.pkl") + 100
    whole[start : start + 400] = bytes(400)
    path = tmp_path / "damaged.pt"
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"damaged\.pt"):
        read_checkpoint(path, trust=trust)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"hello, world", "is not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x02garbage", "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list"),
        ({"model": {}}, r"no state_dict and no config \(it holds model\)"),
        ({"state_dict": {"w": torch.ones(1)}}, "no config"),
        ({"state_dict": {"w": torch.ones(1)}, "config": {}}, "names no model"),
        ({"state_dict": {}, "config": {"model": {}}}, "state_dict is empty"),
        ({"model_config": {}, "model_state_dict": {}}, "fairchem 2"),
    ],
)
def test_other_files_of_pytorch_are_refused(tmp_path: Path, contents: Any, message: str) -> None:
    path = tmp_path / "c.pt"
    torch.save(contents, path)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("trust", [False, True])
def test_a_checkpoint_of_fairchem_2_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    name = "fairchem.core.units.mlip_unit.api.inference"
    module = types.ModuleType(name)
    module.MLIPInferenceCheckpoint = type(  # type: ignore[attr-defined]
        "MLIPInferenceCheckpoint", (), {"__module__": name}
    )
    path = tmp_path / "uma.pt"
    with monkeypatch.context() as patch:
        for depth in range(3, 7):
            package = ".".join(name.split(".")[:depth])
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save(module.MLIPInferenceCheckpoint(), path)
    with pytest.raises(UserError, match="is a checkpoint of fairchem 2"):
        read_checkpoint(path, trust=trust)


def test_writing_gives_back_what_was_written(tmp_path: Path) -> None:
    path = write_checkpoint(_contents(step=3), tmp_path / "new" / "c.pt")
    read = read_checkpoint(path)
    assert read["step"] == 3
    assert torch.equal(read["state_dict"]["w"], torch.arange(3.0))
    assert os.listdir(path.parent) == ["c.pt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_checkpoint(_contents(step=1), tmp_path / "c.pt")
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_checkpoint(_contents(file=(i for i in range(3))), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    path = write_checkpoint(_contents(), tmp_path / "c.pt")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
