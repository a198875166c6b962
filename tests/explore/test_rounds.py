"""``fairchem-kd rounds``: training, exploring and training on, through the command."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command, wait_until
from explorations import FAST, samples
from submitit.core.job_environment import SignalHandler
from trainings import assert_same, config, inside, write_home, write_lmdb, write_yaml

from fairchem_kd.commands import rounds_job
from fairchem_kd.commands.jobs import Request
from fairchem_kd.commands.main import main
from fairchem_kd.commands.rounds import add_arguments
from fairchem_kd.data.pool import make_pool
from fairchem_kd.explore.rounds import running, trainings
from fairchem_kd.explore.rounds.table import Row, table_of
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.npz import read_array
from fairchem_kd.reading import read_json
from fairchem_kd.stock.datasets import collate
from fairchem_kd.store import Reader
from fairchem_kd.teachers.answers import structures_of

WORDS = ["rounds", "config.yml", "--rounds", "1", "--steps", "4", "--every", "2", "--cpu",
         "--frames", "5", "--limit", "4", "--window", "0", "1000", *FAST]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    with inside(folder):
        write_home({"train": 6, "val": 2}, model="painn")
        write_lmdb(Path("more"), 5, seed=90)
        write_yaml(Path("config.yml"), arguments())
    return folder


def arguments(**distillation: Any) -> dict[str, Any]:
    given = {
        "teacher": {"checkpoint": "teacher.pt"},
        "losses": {"vanilla": {}},
        "unlabelled": {"dataset": {"format": "lmdb", "src": "more"}},
    }
    return config(
        Path(), Path("data"), distillation={**given, **distillation}, checkpoint_every=1,
        max_epochs=3, eval_every=2,
    )  # fmt: skip


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(trainings, "run_command", forked(lambda _: None))
    yield tmp_path / "home"
    logging.disable(logging.NOTSET)
    gc.collect()


def forked(then: Callable[[Command], Any], **how: Any) -> Callable[..., int]:
    """Runs the training in a process that has the imports behind it.

    Args:
        then: is called with it while it runs.
        how: see Command.
    """

    def run(command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> int:
        words = list(command[command.index("main") :])
        stores = {trainings.VARIABLE: environment[trainings.VARIABLE]}
        training = Command(words, Path.cwd(), log.absolute(), **how, **stores)
        then(training)
        return training.wait()

    return run


def test_a_student_is_trained_on_with_what_its_dynamics_found_and_so_is_a_control(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--epochs", "2", "--lr", "3e-4"]
    assert main([*words, "--out", "out"]) == 0
    told = read_json(Path("out/rounds.json"))
    names = [row["name"] for row in told["rows"]]
    assert names == ["student 0", "student 1", "rattled alone"]
    assert [row["structures"] for row in told["rows"]] == [0, 5, 5]
    for row in told["rows"]:
        assert row["exploration"]["looked_at"] == 8
        assert row["errors"].keys() == {"energy", "forces"}
    out = capsys.readouterr().out
    assert "rattled alone" in out
    assert "errors in meV and meV/Å of val" in out
    assert "| student 1 | 5 |" in Path("out/table.md").read_text()
    # What was found stands behind what was there, in the config of the second training alone.
    found, own = samples("out/round_0/frames/more"), samples("more")
    assert len(found) == 5
    assert not Path("out/round_0/pool").exists()
    second = yaml.safe_load(Path("out/round_1/config.yml").read_text())
    dataset = second["task"]["distillation"]["unlabelled"]["dataset"]
    assert dataset == {"format": "lmdb", "src": "out/round_1/pool"}
    # Its schedule ends with it, at a step that is evaluated: 3 epochs of 3 steps before, 2 now.
    first = yaml.safe_load(Path("out/round_0/config.yml").read_text())["optim"]
    assert (first["max_epochs"], first["T_max"], second["optim"]["max_epochs"]) == (3, 8, 2)
    assert (second["optim"]["T_max"], 6 % second["optim"]["eval_every"]) == (5, 0)
    assert (first["lr_initial"], second["optim"]["lr_initial"]) == (2e-3, 3e-4)
    sizes = [int(one.natoms) for one in (*own, *found)]
    assert read_array("out/round_1/pool/metadata.npz", "natoms").tolist() == sizes
    control = samples("out/rattled_1/frames/more")
    assert len(control) == 5
    # The trainings begin with the student before them.
    for folder in ("round_1", "rattled_1"):
        log = Path(f"out/{folder}/log.txt").read_text()
        assert "out/round_0/checkpoints/student/best_checkpoint.pt" in log
    # What has ended is not done again.
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/checkpoints/*/*.pt")}
    assert main([*words, "--out", "out"]) == 0
    assert read_json(Path("out/rounds.json")) == told
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*words, "--out", "out", "--seed", "1"]) == 2
    assert "has rounds with another seed (0, and now 1)" in capsys.readouterr().err


def test_rounds_that_were_killed_end_as_they_would_have(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a teacher that has no checkpoint: a calculator, which is asked before the training."""
    given = arguments(teacher={"store": "store"})
    given["optimizer"].update(max_epochs=10, eval_every=10, checkpoint_every=2)
    write_yaml(Path("config.yml"), given)
    words = [*WORDS, "--no-control", "--window", "1000", "2000", "--before-crash", "0",
             "--calculator", "ase.calculators.emt:EMT"]  # fmt: skip
    assert main([*words, "--out", "whole"]) == 0
    assert "The window is empty" in capsys.readouterr().out
    assert not Path("whole/round_1").exists()

    def kill(training: Command) -> None:
        saved = Path("cut/round_0/checkpoints/student/checkpoint.pt")
        wait_until(lambda: saved.is_file() or not training.running, "the first checkpoint")
        training.kill()

    monkeypatch.setattr(trainings, "run_command", forked(kill, held_at=6))
    assert main([*words, "--out", "cut"]) == 2
    assert "was killed by signal 9" in capsys.readouterr().err
    monkeypatch.setattr(trainings, "run_command", forked(lambda _: None))
    assert main([*words, "--out", "cut"]) == 0
    ends = [
        read_checkpoint(Path(f"{out}/round_0/checkpoints/student/checkpoint.pt"))["state_dict"]
        for out in ("cut", "whole")
    ]
    assert_same(*ends, "the student")
    rows = [read_json(Path(f"{out}/rounds.json"))["rows"] for out in ("cut", "whole")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("distillation", "words", "message"),
    [
        ({"unlabelled": {"dataset": {"format": "ase_db", "src": "x"}}}, [], "dataset.format"),
        ({"unlabelled": {"dataset": {"src": "more", "first_n": 3}}}, [], "dataset.first_n"),
        ({"teacher": {"store": "here"}}, [], "there is nobody to ask on the way"),
        ({"teacher": {"checkpoint": ["a.pt", "b.pt"]}}, [], "names 2 teachers"),
        ({}, ["--calculator", "ase.calculators.emt:EMT"], "without a checkpoint"),
        ({"losses": {"vanila": {}}}, [], "vanila"),
        ({}, ["--every", "9"], "no frame would be taken"),
        ({}, ["--out", "data"], "is no folder of rounds"),
        ({}, ["--source", "nowhere"], "nowhere does not exist"),
        ({}, ["--source", "data/val"], "data/val is for validation or tests"),
        ({}, ["--source", "data", "--splits", "train", "val"], "is for validation or tests"),
        ({}, ["--student", "gone.pt"], "gone.pt does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    distillation: dict[str, Any], words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(trainings, "run_command", lambda *_: pytest.fail("it trains"))
    write_yaml(Path("config.yml"), arguments(**distillation))
    assert main([*WORDS, *([] if "--out" in words else ["--out", "out"]), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plain_config_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yaml(Path("plain.yml"), config(Path(), Path("data")))
    for name, message in (("plain.yml", "has no task.distillation"), ("no.yml", "does not exist")):
        assert main(["rounds", name, "--out", "out"]) == 2
        assert message in capsys.readouterr().err


def test_a_training_that_fails_is_told_with_its_last_lines(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Sequence[str], log: Path, environment: Any, lock: int) -> int:
        log.write_text("it is no good\n")
        return 3

    monkeypatch.setattr(trainings, "run_command", fail)
    assert main([*WORDS, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "The training in out/round_0 ended with exit code 3" in error
    assert "it is no good" in error


def test_rounds_of_one_folder_wait_for_nobody(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trainings.claimed(Path("out")):
        assert main([*WORDS, "--out", "out"]) == 2
    assert "are at work in out" in capsys.readouterr().err


def test_a_command_is_run_with_its_log_and_its_code(tmp_path: Path) -> None:
    read, write = os.pipe()
    command = ["sh", "-c", "echo $WORD; exit 4"]
    (tmp_path / "log").write_text("before\n")
    assert trainings.run_command(command, tmp_path / "log", {"WORD": "here"}, write) == 4
    assert (tmp_path / "log").read_text() == "before\nhere\n"
    os.close(read)
    os.close(write)


def test_a_pool_without_an_index_of_each_part_has_none(home: Path) -> None:
    Path("more/metadata.npz").unlink()
    make_pool(Path("pool"), [Path("more"), Path("data/val/data.0000.lmdb")])
    assert sorted(path.name for path in Path("pool").iterdir()) == [
        "data.000000.lmdb", "data.000001.lmdb",
    ]  # fmt: skip


def test_a_row_without_errors_or_frames_has_dashes() -> None:
    row = Row("student 0", 0, {}, {"window": [1, 2], "inside": 0, "crashes": 0})
    assert row.is_content
    assert not Row("x", 0, {}, {"inside": 1, "crashes": 0}).is_content
    assert not Row("x", 0, {}, {"inside": 0, "crashes": 1}).is_content
    assert table_of([row], "").rows == [["student 0", "0", "-", "-", "-", "0", "-", "0", "-"]]


COUNTING = """
from ase.calculators.emt import EMT


class Counting(EMT):
    def calculate(self, atoms=None, *more, **options):
        super().calculate(atoms, *more, **options)
        with open("asked.txt", "a") as file:
            file.write(atoms.positions.tobytes().hex() + "\\n")
"""


def test_rounds_begin_with_a_student_and_ask_a_calculator_once_about_what_it_finds(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("counting.py").write_text(COUNTING)
    write_yaml(Path("config.yml"), arguments(teacher={"store": "store"}))

    def train(folder: Path, *_: Any, start: Path, **__: Any) -> Path:
        assert (folder, start) == (Path("out/round_1"), Path("teacher.pt"))
        with Path("asked.txt").open("a") as file:
            file.write("trains\n")
        return Path("teacher.pt")

    monkeypatch.setattr(running, "train", train)
    words = [*WORDS, "--calculator", "counting:Counting", "--no-control", "--out", "out",
             "--student", "teacher.pt"]  # fmt: skip
    assert main(words) == 0
    asked = Path("asked.txt").read_text().split("trains")[0].split()  # until it trains on
    found = samples("out/round_0/frames/more")
    assert len(found) == 5
    for one in found:
        assert asked.count(one.pos.numpy().astype(float).tobytes().hex()) == 1
    reader = Reader("store")
    for one in found:
        (structure,) = structures_of(collate([one]))
        assert reader.has(structure.key(), ["output:energy", "output:forces"])
    reader.close()


def test_a_round_adds_as_many_as_it_may_whatever_its_sources_are_called(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does rattling, of which two of the sources are of one split."""
    monkeypatch.setattr(running, "train", lambda *_, **__: Path("teacher.pt"))
    write_lmdb(Path("other/train"), 4, seed=120)
    words = [*WORDS, "--source", "more", "data", "other", "--student", "teacher.pt"]
    assert main([*words, "--budget", "4", "--rounds", "2", "--out", "out"]) == 0
    rows = read_json(Path("out/rounds.json"))["rows"]
    assert [row["structures"] for row in rows] == [0, 4, 4]
    assert len(samples("out/round_0/frames/train")) == 4
    assert len(samples("out/rattled_1/frames/train")) == 4


FINAL = [*WORDS, "--rounds", "2", "--final", "--student", "teacher.pt"]


def test_a_final_student_is_trained_on_all_that_was_found_as_long_as_the_rounds_were(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the student that the rounds began with; and so is its control."""
    trained: list[tuple[Path, Path]] = []

    def train(folder: Path, *_: Any, start: Path, **__: Any) -> Path:
        trained.append((Path(folder.name), start))
        shutil.copy("teacher.pt", student := folder / "student.pt")
        return student

    monkeypatch.setattr(running, "train", train)
    assert main([*FINAL, "--epochs", "2", "--out", "out"]) == 0
    first = Path("teacher.pt")
    assert trained == [
        (Path("round_1"), first),
        (Path("round_2"), Path("out/round_1/student.pt")),
        (Path("final_2"), first),
        (Path("rattled_final_2"), first),
    ]
    # A student goes another way in each round, be it the same one.
    found = [one.pos.numpy().tobytes() for n in range(3) for one in samples(_frames(n))]
    assert len(set(found)) == len(found) == 15
    rows = read_json(Path("out/rounds.json"))["rows"]
    assert [row["name"] for row in rows] == [
        "student 0", "student 1", "student 2", "final", "rattled alone",
    ]  # fmt: skip
    assert [row["structures"] for row in rows] == [0, 5, 10, 10, 10]
    optims = [
        yaml.safe_load(Path(f"out/{one}/config.yml").read_text())["optim"]
        for one in ("round_2", "final_2", "rattled_final_2")
    ]
    assert [one["max_epochs"] for one in optims] == [2, 4, 4]
    assert [one["T_max"] for one in optims] == [5, 11, 11]  # 8 of 3 epochs
    for one, found in (("final", "round_0 round_1"), ("rattled_final", "rattled_1 rattled_2")):
        pool = [int(s.natoms) for n in range(3) for s in _in_file(f"out/{one}_2/pool", n)]
        folders = [f"out/{name}/frames/more" for name in found.split()]
        expected = [s for folder in ("more", *folders) for s in samples(folder)]
        assert pool == [int(one.natoms) for one in expected]
    # Of one round it would be the student that there is.
    trained.clear()
    assert main([*FINAL, "--rounds", "1", "--out", "one"]) == 0
    assert [str(folder) for folder, _ in trained] == ["round_1", "rattled_1"]
    assert "There was one round" in Path("one/table.md").read_text()


def _frames(number: int) -> str:
    return f"out/round_{number}/frames/more"


def _in_file(folder: str, number: int) -> list[Any]:
    """The samples of one file of a pool."""
    Path(f"{folder}/{number}").mkdir()
    shutil.copy(f"{folder}/data.{number:06d}.lmdb", f"{folder}/{number}/data.0000.lmdb")
    return samples(f"{folder}/{number}")


def test_a_final_training_that_was_killed_ends_as_it_would_have(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = running.train

    def last(folder: Path, *given: Any, **more: Any) -> Path:
        return train(folder, *given, **more) if "final" in str(folder) else Path("teacher.pt")

    def kill(training: Command) -> None:
        saved = Path("cut/final_2/checkpoints/student/checkpoint.pt")
        wait_until(lambda: saved.is_file() or not training.running, "the first checkpoint")
        training.kill()

    monkeypatch.setattr(running, "train", last)
    words = [*FINAL, "--no-control", "--epochs", "2"]
    assert main([*words, "--out", "whole"]) == 0
    monkeypatch.setattr(trainings, "run_command", forked(kill, held_at=6))
    assert main([*words, "--out", "cut"]) == 2
    assert "The training in cut/final_2 was killed by signal 9" in capsys.readouterr().err
    monkeypatch.setattr(trainings, "run_command", forked(lambda _: None))
    assert main([*words, "--out", "cut"]) == 0
    ends = [
        read_checkpoint(Path(f"{out}/final_2/checkpoints/student/checkpoint.pt"))["state_dict"]
        for out in ("cut", "whole")
    ]
    assert_same(*ends, "the student")
    rows = [read_json(Path(f"{out}/rounds.json"))["rows"] for out in ("cut", "whole")]
    assert rows[0] == rows[1]


def test_a_job_is_told_all_that_the_command_was(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(rounds_job, "submit", lambda *given: told.append(given) or False)
    given = ["config.yml", "--out", "out", "--rounds", "2", "--frames", "7", "--budget", "9",
             "--epochs", "4", "--lr", "0.002", "--student", "teacher.pt", "--source", "more",
             "data", "--splits", "train", "--limit", "3", "--seed", "5", "--no-control",
             "--final", "--temperature", "300", "600", "--steps", "40",
             "--every", "4", "--time-step", "0.25", "--friction", "0.1", "--window", "0.1", "2",
             "--before-crash", "1", "--min-distance", "0.6", "--max-gap", "4", "--max-force", "30",
             "--apart-from", "data", "--alike", "0.02", "--batch", "8", "--cpu", "--retry",
             "--calculator", "a:b", "--calculator-args", '{"c": 1}', "--teacher-name", "d",
             ]  # fmt: skip
    jobs = ["--submit", "--slurm-partition", "gpu", "--slurm-mem", "12", "--slurm-timeout", "0.5"]
    assert main(["rounds", *given, *jobs]) == 1
    ((words, out, request, slurm),) = told
    assert (out, slurm) == (Path("out"), None)
    assert (request.partition, request.memory, request.hours) == ("gpu", 12, 0.5)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    one, other = parser.parse_args(given), parser.parse_args(words[1:])
    assert (words[0], one) == ("rounds", other)
    untouched = parser.parse_args(["config.yml", "--out", "out"])
    same = [name for name, value in vars(one).items() if value == getattr(untouched, name)]
    assert not [name for name in same if not name.startswith(("slurm", "submit", "config", "out"))]
    monkeypatch.undo()
    assert main(["rounds", "no.yml", "--out", "out", "--submit"]) == 2
    assert "no.yml does not exist" in capsys.readouterr().err


def test_a_job_without_a_scheduler_is_waited_for_and_what_it_said_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(cpu=True, hours=1.0, memory=1)
    said: list[str] = []
    words = ["rounds", "gone.yml", "--out", "out"]
    assert not rounds_job.submit(words, Path("out"), request, None, said.append, "local")
    assert "no scheduler here" in said[0]
    assert said[1].startswith("error: The config gone.yml does not exist; see ")
    assert not Path("out").exists()


def test_a_training_is_interrupted_where_its_rounds_have_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C, so that it saves; and killed where it does not end."""

    def leave(*_: Any) -> None:
        raise SystemExit(7)

    read, write = os.pipe()
    log = tmp_path / "log"
    before = signal.signal(signal.SIGALRM, leave)
    try:
        for caught in ("echo saved; exit 0", ""):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            script = f"trap '{caught}' INT; while :; do sleep 0.05; done"
            monkeypatch.setattr(trainings, "_PATIENCE", 5.0 if caught else 0.3)
            with pytest.raises(SystemExit, match="7"):
                trainings.run_command(["sh", "-c", script], log, dict(os.environ), write)
    finally:
        signal.signal(signal.SIGALRM, before)
    os.close(read)
    os.close(write)
    assert log.read_text() == "saved\n"


def test_a_schedulers_signals_do_not_end_the_training_of_a_job(tmp_path: Path) -> None:
    script = ["sh", "-c", "kill -USR2 $$; kill -TERM $$; echo $0 here", "still"]
    handler = SignalHandler.__new__(SignalHandler)
    read, write = os.pipe()
    before = signal.getsignal(signal.SIGUSR2)
    for number, end in enumerate((-signal.SIGUSR2, 0)):
        log = tmp_path / f"log{number}"
        assert trainings.run_command(script, log, dict(os.environ), write) == end
        signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    signal.signal(signal.SIGUSR2, before)
    os.close(read)
    os.close(write)
    assert (tmp_path / "log1").read_text() == "still here\n"
