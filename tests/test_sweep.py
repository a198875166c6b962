"""Sweeps: their YAML, their points and names, what is refused, their tables."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from models import model_config

from fairchem_kd.cli import fairchem, main
from fairchem_kd.errors import UserError
from fairchem_kd.records import Records
from fairchem_kd.sweep.collect import collect, estimate, run_metrics
from fairchem_kd.sweep.columns import short_keys
from fairchem_kd.sweep.job import claim, note_submitted
from fairchem_kd.sweep.keys import with_values
from fairchem_kd.sweep.local import _note_stop
from fairchem_kd.sweep.manifest import expand, read_manifest, resolve, run_name
from fairchem_kd.sweep.output import ATTEMPT, last_words
from fairchem_kd.sweep.scheduler import Jobs, known_jobs
from fairchem_kd.sweep.spec import read_sweep
from fairchem_kd.sweep.state import (
    Status,
    read_state,
    status,
    statuses,
    this_process,
    write_state,
)
from fairchem_kd.sweep.submit import SweepJob
from fairchem_kd.workarounds import sweep_grid

E2N = "task.distillation.losses.e2n"
BASE: dict[str, Any] = {
    "trainer": "fairchem_kd.DistillationTrainer",
    "model": model_config("painn"),
    "dataset": {"train": {"format": "lmdb", "src": "data/train"}},
    "task": {"distillation": {"teacher": {"checkpoint": "teacher.pt"}, "losses": {"e2n": {}}}},
    "loss_functions": [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 10}},
    ],
    "evaluation_metrics": {"metrics": {"energy": ["mae"]}, "primary_metric": "energy_mae"},
    "optim": {"lr_initial": 1e-3, "max_epochs": 2, "scheduler": "CosineAnnealingLR"},
    "logger": "tensorboard",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base config."""
    monkeypatch.chdir(tmp_path)
    Path("base.yml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def write(contents: Any, name: str = "sweep.yml") -> Path:
    path = Path(name)
    text = contents if isinstance(contents, str) else yaml.safe_dump(contents, sort_keys=False)
    path.write_text(text)
    return path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a refused command."""
    assert main(["sweep", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# -- points ---------------------------------------------------------------------------------------


def test_grid_random_and_points_add_up(place):
    path = write(
        {
            "base": "base.yml",
            "seeds": [0, 3],
            "set": {"optim": {"max_epochs": 5}},
            "grid": {E2N: {"coefficient": ["1e-1", 2]}, "optim.lr_initial": [0.1]},
            "random": {"samples": 2, "keys": {f"{E2N}.coefficient": [7, 8]}},
            "points": {"plain": {E2N: None}, "as it is": {}},
        }
    )
    sweep = read_sweep(path)
    assert sweep.base == Path("base.yml")
    assert sweep.seeds == [0, 3]
    assert [p.label for p in sweep.points] == ["", "", "", "", "plain", "as it is"]
    assert all(p.values["optim.max_epochs"] == 5 for p in sweep.points)
    found = [p.values.get(f"{E2N}.coefficient") for p in sweep.points]
    assert found[:2] == [0.1, 2]  # text that YAML does not take for a number is one here
    assert set(found[2:4]) <= {7, 8}
    runs = resolve(sweep, BASE)
    assert len(runs) == len({run.name for run, _ in runs}) == 12
    plain = next(config for run, config in runs if run.label == "plain")
    assert plain["task"]["distillation"]["losses"]["e2n"] is None
    assert {run.seed for run, _ in runs} == {0, 3}
    assert all("seed" not in config for _, config in runs)  # the command line gives it


def test_a_stock_grid_is_read_as_fairchem_documents_it(place):
    path = write({"optim": {"lr_initial": [0.1, 0.2]}, "model.num_layers": [2, 3]})
    sweep = read_sweep(path)
    assert [p.values for p in sweep.points] == [
        {"optim.lr_initial": lr, "model.num_layers": n} for lr in (0.1, 0.2) for n in (2, 3)
    ]
    with pytest.raises(UserError, match=r"names no base config.*--config-yml"):
        expand(path)
    assert len(expand(path, config_yml=Path("base.yml")).runs) == 4


def test_fairchem_and_fairchem_kd_span_the_same_configs(place):
    path = write({"base": "lost.yml", "seeds": [1, 2], "grid": {f"{E2N}.coefficient": [3, 4]}})
    before = copy.deepcopy(BASE)
    grid = sweep_grid({**BASE, "identifier": "id", "seed": 0}, path)
    assert before == BASE
    assert [c["identifier"] for c in grid] == [f"id_run{n}" for n in range(4)]
    assert [c["seed"] for c in grid] == [1, 2, 1, 2]
    explicit = [config for _, config in resolve(read_sweep(path), BASE)]
    keys = BASE.keys()
    assert [{k: c[k] for k in keys} for c in grid] == [{k: c[k] for k in keys} for c in explicit]


def test_random_search_is_reproducible_and_grows(place):
    keys = {
        "optim.lr_initial": {"distribution": "loguniform", "low": 1e-4, "high": 1e-1},
        "optim.max_epochs": {"distribution": "integer", "low": 2, "high": 4},
        f"{E2N}.coefficient": {"distribution": "uniform", "low": 5, "high": 6},
    }

    def points(samples: int, sampler: str = "random", seed: int = 0, **more: Any) -> list[Any]:
        block = {"samples": samples, "sampler": sampler, "seed": seed, "keys": keys | more}
        return [p.values for p in read_sweep(write({"random": block})).points]

    for sampler in ("random", "sobol"):
        found = points(256, sampler)
        assert found == points(256, sampler)
        assert found != points(256, sampler, seed=1)
        assert points(16, sampler) == found[:16]  # more samples add to those that there are
        rates = np.log10([p["optim.lr_initial"] for p in found])
        assert -4 <= rates.min() < -3.8 < -1.2 < rates.max() <= -1
        assert np.mean(rates < -2.5) == pytest.approx(0.5, abs=0.1)
        assert {p["optim.max_epochs"] for p in found} == {2, 3, 4}
        assert all(5 <= p[f"{E2N}.coefficient"] <= 6 for p in found)
    wider = points(16, **{"optim.batch_size": [1, 2]})
    assert [{k: p[k] for k in keys} for p in wider] == points(16)


def test_a_name_is_the_configs_own(place):
    one = {"a": {"b": 1, "c": [1.0, "x"]}, "slurm": {"partition": "gpu"}}
    assert run_name(one, []) == run_name({"a": {"c": [1, "x"], "b": 1.0}}, [])
    assert len(run_name(one, [])) == 10
    different = ({"a": {"b": 2, "c": [1, "x"]}}, {"a": {"b": True, "c": [1, "x"]}}, {"a": {"b": 1}})
    assert len({run_name(config, []) for config in (one, *different)}) == 4
    assert run_name(one, ["--seed", "0"]) != run_name(one, ["--seed", "1"])
    # for ever: a sweep finds its finished runs by these
    assert run_name(one, ["--seed", "0"]) == "fde2202b8c"


def test_values_go_where_their_keys_say():
    config = with_values(
        BASE,
        {
            "loss_functions.1.forces.coefficient": 5,
            f"{E2N}.schedule.decay": "cosine",
            "task.distillation.losses.n2n.coefficient": 3,
            "optim.eta_min": 1e-6,  # the scheduler's
            "optim.optimizer_params.weight_decay": 0.1,
            "optim.ema_decay": 0.99,
            "model.num_rbf": 16,
            "model.rbf": {"name": "gaussian"},  # the model's, not in the base
            "dataset.train.first_n": 100,
            "amp": True,
        },
        "here",
    )
    assert config["loss_functions"][1]["forces"]["coefficient"] == 5
    assert config["task"]["distillation"]["losses"]["e2n"] == {"schedule": {"decay": "cosine"}}
    assert config["task"]["distillation"]["losses"]["n2n"] == {"coefficient": 3}
    assert config["optim"]["optimizer_params"] == {"weight_decay": 0.1}
    assert BASE["loss_functions"][1]["forces"]["coefficient"] == 10
    plain = {**BASE, "task": {"distillation": {**BASE["task"]["distillation"], "losses": None}}}
    config = with_values(plain, {f"{E2N}.coefficient": 3}, "here")
    assert config["task"]["distillation"]["losses"] == {"e2n": {"coefficient": 3}}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optm.lr_initial", 1, "no config has the key optm.lr_initial.*did you mean 'optim'"),
        ("optim.lr_inital", 1, "optim has no 'lr_inital'.*did you mean 'lr_initial'"),
        ("optim.optimizer_parms.amsgrad", True, "did you mean 'optimizer_params'"),
        ("model.hidden_chanels", 8, "model has no 'hidden_chanels'.*'hidden_channels'"),
        ("dataset.trian.src", "x", "dataset has no 'trian'.*did you mean 'train'"),
        ("dataset.train.formt", "x", "train has no 'formt'"),
        ("loss_functions.2.forces.coefficient", 1, "loss_functions is a list of 2"),
        ("logger.name", "x", "logger is 'tensorboard'"),
        (f"{E2N}.coeficient", 1, "unknown key 'coeficient' .did you mean 'coefficient'"),
        (f"{E2N}.coefficient", -1, "e2n.coefficient must be at least 0"),
        ("task.distillation.losses.e3n", {}, "did you mean 'e2n'"),
        ("task.distilation.losses.e2n", {}, "did you mean 'distillation'"),
    ],
)
def test_a_key_that_no_config_has_is_refused(key, value, words):
    with pytest.raises(UserError, match=f"^sweep.yml: .*{words}"):
        with_values(BASE, {key: value}, "sweep.yml")


def test_distillation_keys_need_a_trainer_that_distils():
    with pytest.raises(UserError, match="has no effect, because the config's trainer is ocp"):
        with_values({**BASE, "trainer": "ocp"}, {f"{E2N}.coefficient": 1}, "sweep.yml")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("", "empty sweep"),
        ({"base": "base.yml"}, "is an empty sweep"),
        ({"base": "base.yml", "grid": {}, "seeds": [1]}, "is an empty sweep"),
        ({"base": "base.yml", "seeds": []}, "empty"),
        ({"base": "base.yml", "seeds": [1, 1]}, "twice"),
        ({"base": "base.yml", "seeds": 3}, "seeds must be a list"),
        ({"base": "bsae.yml", "seeds": [1]}, "base config bsae.yml does not exist .*'base.yml'"),
        ({"base": "base.yml", "gird": {"a": [1]}}, "unknown key 'gird' .did you mean 'grid'"),
        ({"grids": {"a": [1]}}, "unknown key 'grids' .did you mean 'grid'"),
        ({"base": "base.yml", "grid": {"optim.max_epochs": 3}}, "must hold a list"),
        ({"base": "base.yml", "grid": {"optim.max_epochs": [3, 3.0]}}, "are the same run .hash"),
        ({"base": "base.yml", "points": [{}, {}]}, "are the same run"),
        ({"base": "base.yml", "points": 3}, "points must be a list"),
        ({"base": "base.yml", "points": [3]}, r"points\[0\] must be a mapping"),
        ({"base": "base.yml", "grid": {"run_dir": ["x"]}}, "run_dir is set by the command"),
        ({"base": "base.yml", "seeds": [1], "grid": {"seed": [1]}}, "give one of them"),
        ({"base": "base.yml", "sampler": "tpe"}, "stands in the block random"),
        (
            {"base": "base.yml", "grid": {"optim": {"max_epochs": [1]}, "optim.max_epochs": [2]}},
            "set the same place",
        ),
        (
            {"random": {"samples": 1, "sampler": "sobbol", "keys": {"a": [1]}}},
            "random.sampler cannot be 'sobbol' .did you mean 'sobol'",
        ),
        ({"random": {"samples": 0, "keys": {"a": [1]}}}, "samples must be at least 1"),
        ({"random": {"samples": 1, "keys": {}}}, "random.keys is empty"),
        ({"random": {"samples": 1, "keys": {"a": 3}}}, "random.keys: a must be a list or"),
        (
            {"random": {"samples": 1, "keys": {"a": {"distribution": "gauss"}}}},
            "distribution cannot be 'gauss'; known: choice, integer, loguniform, uniform",
        ),
        (
            {"random": {"samples": 1, "keys": {"a": {"distribution": "uniform", "low": 1}}}},
            "high is required",
        ),
        (
            {
                "random": {
                    "samples": 1,
                    "keys": {"a": {"distribution": "uniform", "low": 2, "high": 1}},
                }
            },
            "low must be less than high",
        ),
        (
            {
                "random": {
                    "samples": 1,
                    "keys": {"a": {"distribution": "loguniform", "low": 0, "high": 1}},
                }
            },
            "low must be greater than 0",
        ),
        ("grid: {a: [1], a: [2]}", "not valid YAML"),
    ],
)
def test_bad_sweeps_are_a_sentence(place, capsys, contents, words):
    sentence = said(capsys, "expand", str(write(contents)))
    assert re.search(words, sentence), sentence
    assert "sweep.yml" in sentence
    assert not Path("runs").exists()


def test_the_fairchem_command_refuses_the_same(place, capsys):
    argv = ["main", "--mode", "train", "--config-yml", "base.yml", "--sweep-yml"]
    for contents, words in (
        ({"optm": {"lr_initial": [1, 2]}}, "did you mean 'optim'"),
        ({"base": "base.yml", "grid": {f"{E2N}.coeficient": [1]}}, "did you mean 'coefficient'"),
        ({"grid": {}}, "is an empty sweep"),
    ):
        assert fairchem([*argv, str(write(contents))]) == 2
        assert f"error: sweep.yml{'' if 'empty' in words else ':'} " in (
            error := capsys.readouterr().err
        )
        assert words in error


def test_missing_files_are_a_sentence(place, capsys):
    assert "nowhere.yml does not exist" in said(capsys, "expand", "nowhere.yml")
    assert "has no manifest.json" in said(capsys, "status", str(place))
    assert "has no manifest.json" in said(capsys, "collect", str(write({"seeds": [1]})))


def test_what_was_edited_by_hand_is_refused(place, capsys):
    path = str(write({"base": "base.yml", "seeds": [0, 1]}))
    assert main(["sweep", "expand", path]) == 0
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    config = manifest.config_path(manifest.runs[0])
    before = config.read_text()
    config.write_text(before.replace("max_epochs: 2", "max_epochs: 3"))
    sentence = said(capsys, "expand", path)
    assert f"{manifest.runs[0].name}.yml is not the config that its name stands for" in sentence
    config.write_text(before + "# a comment changes nothing\n")
    assert main(["sweep", "expand", path]) == 0
    config.unlink()
    assert main(["sweep", "expand", path]) == 0
    assert config.read_text() == before
    file = manifest.folder / "manifest.json"
    contents = json.loads(file.read_text())
    contents["runs"][0]["seed"] = 5
    file.write_text(json.dumps(contents))
    capsys.readouterr()
    for action in ("expand", "run", "status", "collect"):
        assert "manifest.json was edited by hand" in said(capsys, action, path)
    file.write_text("{")
    assert "cannot be read" in said(capsys, "status", path)


def test_a_folder_holds_one_sweep(place, capsys):
    assert main(["sweep", "expand", str(write({"base": "base.yml", "seeds": [0]}))]) == 0
    other = str(write({"base": "base.yml", "seeds": [0]}, "other.yml"))
    assert "--out" in said(capsys, "expand", other, "--out", "runs/sweeps/sweep")


# -- manifest and states --------------------------------------------------------------------------


def test_expanding_writes_configs_that_stand_alone(place, capsys):
    write({"includes": ["base.yml"], "optim": {"max_epochs": 4}}, "over.yml")
    path = write({"base": "over.yml", "grid": {f"{E2N}.coefficient": [1, 2]}, "seeds": [5]})
    assert main(["sweep", "expand", str(path), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "e2n.coefficient" in table
    assert table.count("pending: not started") == 2
    assert not Path("runs").exists()
    assert main(["sweep", "expand", str(path)]) == 0
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    assert [run.values for run in manifest.runs] == [{f"{E2N}.coefficient": c} for c in (1, 2)]
    for run in manifest.runs:
        config = yaml.safe_load(manifest.config_path(run).read_text())
        assert run_name(config, run.arguments) == run.name
        assert "includes" not in config
        assert config["optim"]["max_epochs"] == 4
        command = manifest.command(run)
        assert command[command.index("--timestamp-id") + 1] == run.name
        assert command[-2:] == ["--seed", "5"]


def test_editing_the_sweep_keeps_what_exists(place, capsys):
    grid = {f"{E2N}.coefficient": [1, 2]}
    path = write({"base": "base.yml", "grid": grid})
    one, two = expand(path).runs
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    for run in (one, two):
        manifest.run_folder(run).mkdir(parents=True)
        write_state(manifest, run, "done")
    grid[f"{E2N}.coefficient"] = [2, 3]
    manifest = expand(write({"base": "base.yml", "grid": grid}))
    found = statuses(manifest)
    assert [found[run.name].state for run in manifest.listed] == ["done", "pending"]
    assert manifest.listed[0].name == two.name
    assert [run.name for run in manifest.runs if not run.listed] == [one.name]
    assert main(["sweep", "status", str(path)]) == 0
    assert f"no longer: {one.name}" in capsys.readouterr().out
    grid[f"{E2N}.coefficient"] = [1]
    assert [run.name for run in expand(write({"base": "base.yml", "grid": grid})).listed] == [
        one.name
    ]


def test_states(place, monkeypatch):
    manifest = expand(write({"base": "base.yml", "seeds": [0, 1, 2, 3]}))
    done, killed, failed, away = manifest.runs
    assert {found.state for found in statuses(manifest).values()} == {"pending"}
    write_state(manifest, done, "done")
    assert status(manifest, done).state == "done"
    assert not claim(manifest, done)
    write_state(manifest, failed, "failed", reason="no more disk")
    assert status(manifest, failed) == Status("failed", "no more disk")

    assert claim(manifest, killed)
    assert status(manifest, killed).state == "running"
    assert not claim(manifest, killed)
    process = subprocess.Popen(["sleep", "60"])
    here = socket.gethostname()
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    started = stat.rpartition(")")[2].split()[19]
    write_state(manifest, killed, "running", host=here, pid=process.pid, started=started)
    assert status(manifest, killed).state == "running"
    process.kill()  # still a zombie
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert status(manifest, killed).state == "failed"
    process.wait()
    found = status(manifest, killed)
    assert found.state == "failed"
    assert "goes on from the start" in found.reason
    assert claim(manifest, killed)

    write_state(manifest, away, "running", host="elsewhere", pid=1, started="1")
    assert status(manifest, away).state == "running"
    with monkeypatch.context() as skewed:  # files are stamped by another host's clock
        skewed.setattr(time, "time", lambda now=time.time: now() + 3600)
        assert status(manifest, away).state == "running"
    old = manifest.folder / "status" / f"{away.name}.json"
    os.utime(old, (1, 1))  # no sign of life since 1970
    assert status(manifest, away).state == "failed"
    write_state(manifest, away, "pending", job="12_0")
    waiting, running, gone = (
        Jobs({"12_0": "pending (Priority)"}),
        Jobs({"12_0": "running"}),
        Jobs({}),
    )
    assert status(manifest, away, waiting) == Status(
        "pending", "job 12_0 is pending (Priority)", "12_0"
    )
    assert status(manifest, away, running).state == "running"
    assert status(manifest, away, gone).state == "failed"
    write_state(manifest, away, "running", job="12_0", host="elsewhere", pid=1, started="1")
    assert status(manifest, away, running).state == "running"
    assert status(manifest, away, waiting).state == "pending"  # queued again
    found = status(manifest, away, gone)  # however fresh the file
    assert found.state == "failed"
    assert "process 1 on elsewhere" in found.reason
    folder = manifest.folder / "jobs/12_0"
    folder.mkdir(parents=True)
    ended = "slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***"
    (folder / "12_0_0_log.err").write_text(ended + "\n")
    assert "DUE TO TIME LIMIT" in status(manifest, away, gone).reason
    ended = Jobs({}, {"12_0": "its node failed"})  # the scheduler knows better
    assert status(manifest, away, ended).reason.startswith("job 12_0: its node failed; goes on")
    assert claim(manifest, away, "12_0")  # requeued
    assert not claim(manifest, away, "13_0")
    assert read_state(manifest, away)["job"] == "12_0"
    note_submitted(manifest, away, "12_0")  # it was faster than the one who submitted it
    assert read_state(manifest, away)["state"] == "running"


def test_who_stops_a_run_notes_it_of_its_own_process_alone(place):
    manifest = expand(write({"base": "base.yml", "seeds": [0]}))
    [run] = manifest.runs
    assert claim(manifest, run)
    _note_stop(manifest, run, os.getpid() + 1)  # whose run this process has taken
    assert status(manifest, run).state == "running"
    _note_stop(manifest, run, os.getpid())
    assert status(manifest, run) == Status("pending", "stopped; goes on from the start")
    write_state(manifest, run, "done", **this_process())
    _note_stop(manifest, run, os.getpid())
    assert status(manifest, run).state == "done"


def test_a_job_that_is_told_to_leave_before_it_has_begun(place, monkeypatch):
    manifest = expand(write({"base": "base.yml", "seeds": [0]}))
    [run] = manifest.runs
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12"}.items():
        monkeypatch.setenv(name, value)
    again = SweepJob(manifest.folder, run.name).checkpoint({"a": 1})
    assert isinstance(again.function, SweepJob)
    assert again.args == ({"a": 1},)
    waiting = Status("pending", "job 12 is pending", "12")
    assert status(manifest, run, Jobs({"12": "pending"})) == waiting


SQUEUE = """\
1|RUNNING|None
2_0|PENDING|Priority
2_1|COMPLETING|None
3|OUT_OF_MEMORY|OutOfMemory
4|TIMEOUT|TimeLimit
5|NODE_FAIL|None
6|FAILED|NonZeroExitCode
7|PREEMPTED|None
77|RUNNING|None
"""
SACCT = """\
8|CANCELLED by 1000
9|PREEMPTED
10|REQUEUED
"""


def test_the_schedulers_words(tmp_path, monkeypatch):
    """Of jobs that live, that ended minutes ago (squeue), and longer ago (sacct)."""
    for name, said in (("squeue", SQUEUE), ("sacct", SACCT)):
        command = tmp_path / name
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = ["1", "2_0", "2_1", *"3456789", "10", "11", "local-1"]
    jobs = known_jobs(asked)
    assert jobs.living == {
        "1": "running",
        "2_0": "pending (Priority)",
        "2_1": "completing",
        "10": "requeued",
    }
    assert jobs.ended == {
        "3": "it was out of memory (--slurm-mem)",
        "4": "it ran out of time (--slurm-timeout)",
        "5": "its node failed",
        "6": "",
        "7": "it was pre-empted, and not queued again",
        "8": "it was cancelled",
        "9": "it was pre-empted, and not queued again",
    }
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert known_jobs(asked) is None
    assert known_jobs(["local-1"]) == Jobs({})


def test_the_reason_is_the_last_attempts(tmp_path):
    log = tmp_path / "log"
    assert last_words(log, "exit code 3") == "exit code 3"
    log.write_text(f"{ATTEMPT} now\nerror: no such teacher.\nmore\n")
    assert last_words(log, "x") == "no such teacher."
    with log.open("a") as file:
        file.write(f"{ATTEMPT} later\nTraceback\ntorch.OutOfMemoryError: no memory\n")
    assert last_words(log, "x") == "torch.OutOfMemoryError: no memory"
    with log.open("a") as file:
        file.write(f"{ATTEMPT} later still\n")
    assert last_words(log, "exit code 3") == "exit code 3"


# -- the table ------------------------------------------------------------------------------------


def test_mean_and_interval_against_the_textbook():
    values = [4.1, 3.7, 4.6]
    found = estimate(values)
    mean = sum(values) / 3
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.half == pytest.approx(4.302652729911275 * s / math.sqrt(3), rel=1e-9)  # t, 2 d.f.
    assert estimate([4.1, 3.7]).half == pytest.approx(12.706204736432095 * 0.2, rel=1e-9)
    assert estimate([2.0]).half is None
    # covers the true mean in 95 of 100 cases
    rng = np.random.default_rng(0)
    draws = [estimate(list(row)) for row in rng.normal(1.0, 2.0, (1000, 4))]
    covered = np.mean([abs(e.mean - 1.0) < (e.half or 0) for e in draws])
    assert covered == pytest.approx(0.95, abs=0.03)


@pytest.fixture
def finished(place) -> Callable[[dict[str, Any]], Path]:
    """Expands a sweep whose runs are done; energy_mae is coefficient + seed / 10 at its best."""

    def make(contents: dict[str, Any]) -> Path:
        path = write({"base": "base.yml", **contents})
        manifest = expand(path)
        for run in manifest.runs:
            best = float(run.values.get(f"{E2N}.coefficient", 7)) + run.seed / 10
            records = Records(manifest.run_folder(run))
            records.write("train", step=1, epoch=0.5, metrics={"energy_mae": 0.0})
            for step, value in ((2, 9999.0), (2, best + 1), (4, best), (6, best + 2)):
                metrics = {"energy_mae": value, "forces_mae": step}
                records.write("val", step=step, epoch=step / 4, metrics=metrics)
            write_state(manifest, run, "done")
        return path

    return make


def test_collect(finished, capsys):
    path = finished({"seeds": [0, 1, 2], "grid": {f"{E2N}.coefficient": [1, 10, 100]}})
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    assert run_metrics(manifest, manifest.runs[1]) == {"energy_mae": 1.1, "forces_mae": 4.0}
    assert run_metrics(manifest, manifest.runs[1], "last")["energy_mae"] == pytest.approx(3.1)
    write_state(manifest, manifest.runs[0], "failed", reason="x")
    assert main(["sweep", "collect", str(path), "--metrics", "energy_mae"]) == 0
    out = capsys.readouterr().out
    half = 12.706204736432095 * 0.05  # of 1.1 and 1.2
    assert f"| 1 | 2 of 3 | 1.15 ± {half:.2g} |" in out
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert f"| 10 | 3 | 10.1 ± {half:.2g} |" in out
    head, *lines = (manifest.folder / "results.csv").read_text().splitlines()
    assert head.startswith("e2n.coefficient,seeds,done,energy_mae_mean,energy_mae_ci95")
    assert lines[0].startswith("1,3,2,1.15")
    assert len(lines) == 3
    assert (manifest.folder / "results.md").read_text() in out
    assert (manifest.folder / "results.png").stat().st_size > 5000
    assert main(["sweep", "collect", str(path), "--partial", "--no-plot"]) == 0
    assert "of 3" not in capsys.readouterr().out
    sentence = said(capsys, "collect", str(path), "--metrics", "force_mae")
    assert "did you mean 'forces_mae'" in sentence


def test_collect_of_named_points_and_of_nothing(finished, place, capsys):
    path = finished({"points": {"e2n": {}, "plain | x": {E2N: None}}, "seeds": [0, 1]})
    assert main(["sweep", "collect", str(path), "--at", "last"]) == 0
    out = capsys.readouterr().out
    assert "| point | seeds | energy_mae | forces_mae |" in out
    assert "| plain \\| x | 2 | 9.05 ±" in out
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    for run in manifest.runs:
        write_state(manifest, run, "failed", reason="x")
    assert "no run of this sweep has metrics yet" in said(capsys, "collect", str(path))
    rows = collect(manifest, statuses(manifest))
    assert [row.done for row in rows] == [0, 0]


def test_short_keys():
    keys = ["optim.lr_initial", f"{E2N}.coefficient", f"{E2N[:-3]}n2n.coefficient", "amp"]
    assert list(short_keys(keys).values()) == [
        "optim.lr_initial",
        "e2n.coefficient",
        "n2n.coefficient",
        "amp",
    ]
    assert short_keys(["a.x.y", "b.x.y"]) == {"a.x.y": "a.x.y", "b.x.y": "b.x.y"}


def test_shipped_sweeps_expand(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    paths = sorted(Path("yaml_configs/sweeps").glob("*.yml"))
    assert len(paths) >= 9
    for path in paths:
        runs = expand(path, write=False).runs
        assert runs
        if path.stem != "collisions_coefficients":  # which is to try
            assert len(runs) % 8 == 0, path  # for nodes of 8 GPUs
