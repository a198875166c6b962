"""A run's folder has one owner at a time; one that is gone is no obstacle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import wait_until
from trainings import config, trainer
from trainings import data as data

from fairchem_kd.errors import UserError
from fairchem_kd.processes import process_start, this_process
from fairchem_kd.training import owner
from fairchem_kd.training.interruption import how_to_go_on
from fairchem_kd.training.owner import OWNER, STALE, Owner

HOLD = """
import sys, time
from fairchem_kd.training.owner import Owner
with Owner(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(1200)
"""


def write(folder: Path, age: float = 0.0, **record: Any) -> None:
    path = folder / OWNER
    path.write_text(json.dumps(record))
    then = time.time() - age
    os.utime(path, (then, then))


def test_a_folder_is_owned_and_left(tmp_path: Path) -> None:
    with Owner(tmp_path / "run"):
        record = json.loads((tmp_path / "run" / OWNER).read_text())
        assert record["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_another_process_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "owned\n"
        with pytest.raises(UserError, match=rf"Another training runs in .*process {holder.pid} on"):
            Owner(tmp_path).__enter__()
        holder.kill()  # and once it is dead, nobody has to wait, ...
        wait_until(lambda: process_start(holder.pid) is None, "its end")
        with Owner(tmp_path):  # not even for its parent to notice
            pass
        holder.wait()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize(
    ("record", "age", "taken"),
    [
        ({"host": "elsewhere", "pid": 1}, 1.0, True),
        ({"host": "elsewhere", "pid": 1}, STALE + 5, False),
        ({"host": "elsewhere", "pid": 1, "job": "77"}, 1.0, False),  # this job, requeued
        ({"host": "elsewhere", "pid": 1, "job": "78"}, 1.0, True),
        ({}, 1.0, False),  # cut off by a crash
    ],
)
def test_owners_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Any, age: float, taken: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path, age, **record)
    if taken:
        with pytest.raises(UserError, match="elsewhere"):
            Owner(tmp_path).__enter__()
        assert json.loads((tmp_path / OWNER).read_text()) == record
    else:
        with Owner(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    write(tmp_path, 1.0, host=this_process()["host"], pid=os.getpid(), started="1")
    with Owner(tmp_path):
        pass


def test_an_owner_that_lives_is_seen_to_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.05)
    with Owner(tmp_path):
        os.utime(tmp_path / OWNER, (0, 0))
        wait_until(lambda: (tmp_path / OWNER).stat().st_mtime > 1, "a sign of life")


def test_two_trainings_of_one_name(tmp_path: Path, data: Path) -> None:
    given = config(tmp_path, data, max_epochs=1)
    with trainer(given, timestamp_id="one") as built:
        write(Path(built.config["cmd"]["checkpoint_dir"]), 1.0, host="elsewhere", pid=1)
        with pytest.raises(UserError, match=r"Another training runs in .*one .*--timestamp-id"):
            built.train(disable_eval_tqdm=True)
        assert not (Path(built.config["cmd"]["checkpoint_dir"]) / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/bin/fairchem", "main", "--mode", "train", "--config-yml", "my configs/a.yml"],
         "fairchem main --mode train --config-yml 'my configs/a.yml' --timestamp-id x"),
        (["/a/fairchem_kd/__main__.py", "--mode", "train", "--timestamp-id", "old", "--cpu"],
         "python -m fairchem_kd --mode train --cpu --timestamp-id x"),
        (["fairchem", "--timestamp-id=old", "--cpu"], "fairchem --cpu --timestamp-id x"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert how_to_go_on("x") == said
