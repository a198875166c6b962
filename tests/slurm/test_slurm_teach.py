"""``fairchem-kd teach --submit`` on a real SLURM: an array fills one store."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import wait_until
from trainings import write_home, write_lmdb

from fairchem_kd.commands.main import main
from fairchem_kd.store import Reader

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_an_array_fills_one_store(
    slurm: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    write_home({"train": 2, "val": 2})
    write_lmdb(Path("data/many"), 35, seed=70)
    words = ["teach", "data/many", "--teacher", "teacher.pt", "--out", "store", "--cpu"]
    more = ["--submit", "--parts", "2", "--slurm-mem", "2", "--slurm-timeout", "1"]
    assert main([*words, *more, "--slurm-partition", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "error: the scheduler refused the job: " in error
    assert "partition" in error
    assert main([*words, *more]) == 0
    told = capsys.readouterr().out
    assert "2 parts are the jobs " in told
    first = told.partition("the jobs ")[2].split()[0]
    assert first.endswith("_0")  # a task of an array
    queue = ["squeue", "-h"]
    wait_until(lambda: not subprocess.check_output(queue), "the jobs' end", every_s=0.5)
    reader = Reader("store")
    assert sorted(len(shard.entries) for shard in reader.shards) == [3, 32], told
    reader.close()
    assert len(list(Path("teach_jobs").iterdir())) >= 2
    assert main(["teach", "verify", "store", "--cpu", "--samples", "3"]) == 0
