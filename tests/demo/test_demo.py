"""The demo: what it plans, how it trains side by side, and the whole of it on tiny data."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, wait_until
from trainings import config, inside, write_home, write_yaml

from fairchem_kd.commands import main as cli
from fairchem_kd.demo import children, plan
from fairchem_kd.demo.progress import Progress
from fairchem_kd.demo.regime import _structures, regime
from fairchem_kd.errors import UserError
from fairchem_kd.models.file import read_checkpoint

SIZES = {"train": 12, "val": 4, "test": 9, "test_ood": 6}
TEACHERS: dict[str, dict[str, Any]] = {
    "plain": {"losses": None},
    "e2n": {"losses": {"e2n": {}}},
    "outputs": {"losses": {"vanilla": {}}},
    "all": {
        "losses": {"e2n": {"coefficient": 2}, "vanilla": {}},
        "rattle": {"copies": 0.5, "std": 0.05},
        "unlabelled": {"dataset": {"format": "lmdb", "src": "data/more"}, "share": 0.5, "skip": 2},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data, a teacher, and the configs of the four students."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home({**SIZES, "more": 8})
        Path("configs").mkdir()
        for name, distillation in TEACHERS.items():
            run = config(
                Path("."),
                Path("data"),
                teacher=Path("teacher.pt"),
                distillation=distillation,
                eval_every=8,
            )
            run["dataset"]["test"] = {"format": "lmdb", "src": "data/test"}
            write_yaml(Path("configs") / f"{name}.yml", run)
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def at_work_in(folder: Path) -> list[Path]:
    """The logs below ``folder`` that processes print to."""
    found = []
    for printed in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            log = printed.readlink()
            if log.name == children.LOG and folder.absolute() in log.parents:
                found.append(log)
    return found


def test_equal_steps_and_a_schedule_that_is_stretched(home: Path) -> None:
    configs = plan.read_configs(Path("configs"))
    trainings = plan.plan(configs, [3, 4], structures=12, steps=None)
    assert [t.name for t in trainings] == 2 * ["all_long", "plain", "e2n", "outputs", "all"]
    # 2 epochs of ceil(12 / 3)
    assert [t.steps for t in trainings] == 2 * [32, 8, 8, 8, 8]
    assert {t.steps for t in plan.plan(configs, [3], structures=12, times=2)} == {16, 8}
    assert trainings[0].label == "all together, 4 times as long"
    assert all("test" not in t.config["dataset"] for t in trainings)
    assert "test" in configs["plain"]["dataset"]
    [plain] = [t for t in trainings if (t.name, t.seed) == ("plain", 3)]
    long = plan.longer(plain, seconds=260.0, plain_seconds=100.0, structures=12)
    assert (long.name, long.seed, long.steps) == ("plain_long", 3, 20)
    optim = long.config["optim"]
    assert (optim["max_epochs"], optim["T_max"]) == (5, 20)
    same = copy.deepcopy(dict(plain.config))
    for key in ("max_epochs", "T_max", "eval_every"):
        same["optim"][key] = optim[key]
    assert same == long.config
    short = plan.plan(configs, [0], structures=12, steps=5)
    assert [t.steps for t in short] == [16, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "wanted", "given"),
    [
        (7, 375, 375, 375),
        (2, 4, 3, 2),
        (1, 188, 375, 188),
        (13, 94, 376, 94 * 13 // 2),
        (1, 7, 3, 1),
    ],
)
def test_the_last_step_is_evaluated(epochs: int, per_epoch: int, wanted: int, given: int) -> None:
    before = {"optim": {"max_epochs": epochs, "eval_every": wanted, "lr_milestones": [1, 2]}}
    after = plan.stretch(before, epochs, per_epoch)
    assert (epochs * per_epoch) % after["optim"]["eval_every"] == 0
    assert after["optim"]["eval_every"] == given
    assert before["optim"]["eval_every"] == wanted
    assert plan.stretch(before, 3 * epochs, per_epoch)["optim"]["lr_milestones"] == [3, 6]


def test_progress_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fairchem_kd.demo.progress.QUIET", 0.0)
    with Progress() as progress:
        progress.start("all, seed 0", 200)
        progress.update("all, seed 0", 0, 0.0)
        progress.update("all, seed 0", 50, 10.0)
        progress.end("all, seed 0", 41.2)
    assert capsys.readouterr().err.splitlines() == [
        "all, seed 0: started, 200 steps",
        "all, seed 0: step 0 of 200, 0 s",
        "all, seed 0: step 50 of 200, 10 s, about 30 s left",
        "all, seed 0: done in 41 s",
    ]


def test_a_line_for_each_training_on_a_terminal() -> None:
    code = (
        "from fairchem_kd.demo.progress import Progress\n"
        "with Progress() as p:\n"
        "    p.start('all', 200); p.start('e2n', 100); p.update('all', 50, 9.0)\n"
        "    p.update('e2n', 100, 9.0); p.end('e2n', 10.0); p.start('plain', 80)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, check=False, timeout=1200)
    os.close(theirs)
    shown = ""
    while "plain:" not in shown:  # the end of a terminal is an error
        shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert "all:" in shown
    assert "plain:" in shown
    assert "e2n: done in 10 s" in shown


def test_a_folder_for_every_config_seed_and_teacher(home: Path, tmp_path: Path) -> None:
    configs = plan.read_configs(Path("configs"))
    first = plan.plan(configs, [0], 12)
    assert len({t.folder for t in [*first, *plan.plan(configs, [1], 12)]}) == 10
    assert [t.folder for t in first] == [t.folder for t in plan.plan(configs, [0], 12)]
    assert first[0].folder != plan.plan(configs, [0], 12, steps=4)[0].folder
    settings = copy.deepcopy(configs)
    copied = tmp_path / "teacher.pt"
    shutil.copy("teacher.pt", copied)
    settings["all"]["task"]["distillation"]["teacher"]["checkpoint"] = str(copied)
    [before] = [t.folder for t in plan.plan(settings, [0], 12) if t.name == "all"]
    copied.write_bytes(copied.read_bytes() + b"another")
    [after] = [t.folder for t in plan.plan(settings, [0], 12) if t.name == "all"]
    assert before != after


def test_the_regime_in_words(home: Path) -> None:
    from fairchem_kd.analysis.subjects.runs import read_model

    trainings = plan.plan(plan.read_configs(Path("configs")), [0, 1], 12)
    known = {"teacher": 2_500_000, **{t.label: 190_000 for t in trainings}}
    lines = regime(trainings, read_model("teacher.pt"), known, jobs=2, labelling=17.4)
    known_labels = "trained on the labels of 12 structures (data/train)."
    assert lines[0] == f"Teacher: gemnet_oc, 2.50 M parameters, {known_labels}"
    assert "painn, 0.19 M parameters, seeds 0, 1, all with the labels of 12 structures" in lines[1]
    assert "best forces_mae on 4 structures (data/val)" in lines[2]
    assert "The teacher was asked once, which took 17 s" in lines[3]
    assert "- plain: 8 steps of 3 structures, no teacher." in lines
    assert any(line.startswith("- all together: 8 steps of 6 structures; the") for line in lines)
    [everything] = [line for line in lines if line.startswith("- all together, 4 times as long")]
    assert ": 32 steps of 6 structures" in everything
    assert "e2n (coefficient 2), vanilla" in everything
    assert "0.5 rattled copies per structure, displaced by 0.05 Å" in everything
    assert (
        "6 structures (data/more without its first 2), of which the student sees no" in everything
    )


def test_data_that_is_not_here_is_told_by_its_config() -> None:
    settings = {"src": "nowhere/train", "build": {"recipe": "collisions", "train": 16000}}
    assert _structures(settings) == "16000 structures (nowhere/train)"
    assert _structures({"src": "nowhere/train"}) == "structures (nowhere/train)"


def test_refusals(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(*argv: str) -> str:
        assert cli.main(["demo", "--no-plots", *argv]) == 2
        return capsys.readouterr().err

    assert "yaml_configs/demo/plain.yml does not exist" in sentence()
    assert "--seeds must be different" in sentence("--seeds", "1", "1")
    assert "--steps must be at least 1" in sentence("--steps", "0")
    folder = tmp_path / "configs"
    shutil.copytree("configs", folder)
    changed = yaml.safe_load((folder / "e2n.yml").read_text())
    changed["model"]["hidden_channels"] = 32
    (folder / "e2n.yml").write_text(yaml.safe_dump(changed))
    assert "e2n.yml has another model than plain.yml" in sentence("--configs", str(folder))
    changed["model"]["hidden_channels"] = 16
    changed["task"]["distillation"]["teacher"]["checkpoint"] = "other.pt"
    (folder / "e2n.yml").write_text(yaml.safe_dump(changed))
    assert "must have one teacher between them, not: " in sentence("--configs", str(folder))
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is at work in" in sentence("--configs", "configs", "--out", str(out))


@pytest.mark.slow
def test_a_training_that_fails_tells_why_and_stops_the_other(home: Path, tmp_path: Path) -> None:
    configs = plan.read_configs(Path("configs"))
    wrong = copy.deepcopy(configs["e2n"])
    wrong["task"]["distillation"]["losses"] = {"e2n": {"student": "node@9"}}
    trainings = [
        plan.Training("endless", "endless", 0, plan.stretch(configs["plain"], 100_000, 4), 400_000),
        plan.Training("wrong", "wrong", 0, wrong, 8),
    ]
    with (
        children.claimed(tmp_path) as lock,
        pytest.raises(
            UserError, match=r"(?s)wrong, seed 0 ended with exit code 2.*error: .*node@9"
        ),
    ):
        children.train_all(trainings, tmp_path, jobs=2, lock=lock)
    assert at_work_in(tmp_path) == []
    assert not list(tmp_path.glob("*/done.json"))


@pytest.mark.slow
def test_the_demo_interrupted_and_started_again(home: Path) -> None:
    out = Path("out")
    argv = ["demo", "--configs", "configs", "--out", "out", "--jobs", "2", "--longer", "2"]
    logs = [Path("first.log"), Path("second.log")]
    first = Command(argv, home, logs[0].absolute(), of="fairchem-kd")
    wait_until(
        lambda: list(out.glob("plain-s0-*/done.json")) or not first.running, "the plain student"
    )
    assert first.running, logs[0].read_text()
    wait_until(lambda: at_work_in(out), "another student")
    os.kill(first.pid, signal.SIGINT)
    assert first.wait() == 130
    said = logs[0].read_text()
    assert "start the same command again" in said
    assert "Traceback" not in said
    assert at_work_in(out) == []
    [plain] = out.glob("plain-s0-*/done.json")
    kept = plain.stat().st_mtime_ns

    Command(argv, home, logs[1].absolute(), of="fairchem-kd").finish()
    said = logs[1].read_text()
    assert "plain, seed 0: done before" in said
    assert "the teacher: asked before" in said
    assert plain.stat().st_mtime_ns == kept
    assert "- plain: 8 steps of 3 structures, no teacher." in said
    assert "all together against plain on test_ood: energy" in said
    results = json.loads((out / "results.json").read_text())
    models = {model["label"]: model for model in results["models"]}
    labels = plan.labels_by_name(2)
    assert list(models) == ["teacher", *labels.values()]
    assert [models[label]["role"] for label in ("teacher", "plain")] == ["teacher", "baseline"]
    seconds = {k: m["runs"][0]["training_seconds"] for k, m in models.items() if k != "teacher"}
    steps = {k: m["steps"] for k, m in models.items() if k != "teacher"}
    assert {steps[label] for label in plan.STUDENTS.values()} == {8}
    longest = labels[plan.LONGEST]
    assert steps[longest] == 16
    expected = 4 * max(1, round(2 * seconds[longest] / seconds["plain"]))
    assert steps[plan.LONG_LABEL] == expected > 8
    for label in list(labels.values())[1:]:
        for split in ("test", "test_ood"):
            gap = results["splits"][split]["gaps"][label]["forces_mae"]
            assert gap["verdict"] in ("better", "worse", "no evidence")
    assert results["regime"][0].startswith("Teacher: gemnet_oc")
    text = (out / "table.md").read_text()
    assert "### Gap closed between plain student and teacher" in text
    assert (out / "errors.png").is_file()
    assert (out / "pareto.svg").is_file()
    student = read_checkpoint(next(out.glob("all-s0-*/checkpoints/*/best_checkpoint.pt")))
    assert student["config"]["cmd"]["seed"] == 0
