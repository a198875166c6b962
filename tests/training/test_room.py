"""A folder that would not take a checkpoint is refused before the first step."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import attacks
import pytest
import torch
from torch import nn
from trainings import config, trainer, write_splits, write_yaml

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.errors import UserError
from fairchem_kd.training.room import check_room, size_of_checkpoint

Usage = namedtuple("Usage", "total used free")


def test_a_folder_that_takes_it_is_left_as_it_was(tmp_path: Path) -> None:
    check_room(tmp_path / "run", 10_000)
    assert list((tmp_path / "run").iterdir()) == []


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 39_999_999))
    check_room(tmp_path, 9_999_999)
    with pytest.raises(UserError, match=r"has 40 MB free, and 4 checkpoints of about 10 MB"):
        check_room(tmp_path, 10_000_000)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.ENOSPC])
def test_a_limit_that_free_space_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"1 MB cannot be written .*--run-dir"):
        check_room(tmp_path, 10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_takes_no_room_ahead_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    check_room(tmp_path, 10**6)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run .*cannot|cannot be written .*file/run"):
        check_room(tmp_path / "file" / "run", 1000)


def test_the_size_is_at_least_that_of_a_checkpoint(tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=(6, 0), val=(2, 50))
    with trainer(config(tmp_path, data, model="painn")) as built:
        built.train(disable_eval_tqdm=True)
        size = size_of_checkpoint(built.model, averaged=True)
        file = Path(built.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt"
        assert file.stat().st_size < size < 6 * file.stat().st_size + 2**20


def test_a_model_without_averages_takes_less() -> None:
    model = nn.Linear(300, 300, dtype=torch.float64)
    weights = 8 * (300 * 300 + 300)
    without, averaged = (size_of_checkpoint(model, averaged=one) for one in (False, True))
    assert averaged - without == weights


def limited(argv: Sequence[str]) -> int:
    """The command where no file may be larger than 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return fairchem(list(argv))


def test_a_training_is_refused_before_its_first_step(tmp_path: Path) -> None:
    write_splits(tmp_path / "data", train=(6, 0), val=(2, 50))
    write_yaml(tmp_path / "run.yml", config(Path(), Path("data")))
    argv = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu"]
    attacks.run(argv, tmp_path, limited).sentence("cannot be written to the run's folder")
    assert not list(tmp_path.rglob("records.jsonl"))
    assert not list(tmp_path.rglob("*.part"))
