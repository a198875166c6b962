"""``fairchem-kd rounds --submit`` on a real SLURM: told to leave, queued again, gone on with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import wait_until
from trainings import config, write_home, write_lmdb, write_yaml

from fairchem_kd.commands.main import main
from fairchem_kd.reading import read_json
from fairchem_kd.training.records import read_records

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

EPOCHS = 60  # long enough to be interrupted on any machine


def test_rounds_that_are_told_to_leave_are_queued_again_and_go_on(
    slurm: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    write_home({"train": 6, "val": 2}, model="painn")
    write_lmdb(Path("more"), 5, seed=90)
    given = config(
        Path(), Path("data"), max_epochs=EPOCHS, eval_every=EPOCHS,
        checkpoint_every=9 * EPOCHS, distillation={
            "teacher": {"checkpoint": "teacher.pt"},
            "losses": {"vanilla": {}},
            "unlabelled": {"dataset": {"format": "lmdb", "src": "more"}},
        },
    )  # fmt: skip
    write_yaml(Path("config.yml"), given)
    words = ["rounds", "config.yml", "--out", "out", "--rounds", "1", "--epochs", "1", "--cpu",
             "--no-control", "--frames", "3", "--limit", "2", "--window", "0", "1000",
             "--steps", "4", "--every", "2", "--time-step", "5", "--submit"]  # fmt: skip
    words += ["--slurm-mem", "2", "--slurm-timeout", "1"]
    assert main([*words, "--slurm-partition", "nowhere"]) == 2
    assert "error: the scheduler refused the job: " in capsys.readouterr().err
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "; logs in out_jobs, the table in out" in told
    job = told.partition("the rounds are job ")[2].partition(";")[0]
    run = Path("out/round_0/checkpoints/student")
    wait_until(
        lambda: (run / "records.jsonl").is_file() and read_records(run, "train"), "a step", 0.2
    )
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: not living(job), "its end", 0.2)
    assert read_json(Path("out/rounds.json"))["rows"][1]["name"] == "student 1"
    # It saved when it was told to, long before it would have, and went on from there.
    log = Path("out/round_0/log.txt").read_text()
    assert "stopping at the end of this step, with a checkpoint" in log
    assert log.count("has no checkpoint: starting from the beginning") == 1
    assert len(list(Path("out_jobs").rglob("*_log.out"))) >= 1


def living(job: str) -> bool:
    shown = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    return bool(shown.stdout.strip())
