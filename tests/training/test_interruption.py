"""Killed, or told to leave, and started again: the run ends like one that never stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import (
    Command,
    assert_same_end,
    children,
    cmdline,
    ranks_of,
    run_argv,
    steps,
    wait_until,
    write_run,
)

from fairchem_kd.launch.ranks import KDRunner

pytestmark = pytest.mark.slow

LAST_STEP = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    write_run(root, LAST_STEP)
    return root


def argv(place: Path, name: str, ranks: int, *more: str) -> list[str]:
    here = ("--run-dir", str(place), "--timestamp-id", name, "--num-gpus", str(ranks))
    return run_argv(ranks, *here, *more, last_step=LAST_STEP)


def start(place: Path, name: str, ranks: int, **how: Any) -> Command:
    return Command(argv(place, name, ranks), place, place / f"{name}.log", **how)


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(place: Path, request: pytest.FixtureRequest) -> Any:
    """The number of ranks, and the folder of a run that was left alone."""
    name = f"reference{request.param}"
    start(place, name, request.param).finish()
    folder = place / "checkpoints" / name
    assert steps(folder) == list(range(1, LAST_STEP + 1))
    return request.param, folder


def test_killed_at_random_moments(place: Path, uninterrupted: Any) -> None:
    ranks, reference = uninterrupted
    draw = random.Random(ranks)
    folder = reference.with_name(f"killed{ranks}")
    # Before there is a checkpoint, and twice in mid-run.
    for number, after in enumerate((1, draw.randint(4, 8), draw.randint(10, 18))):
        command = start(place, folder.name, ranks, held_at=after + 5)

        def far_enough(command: Command = command, after: int = after) -> bool:
            return not command.running or max(steps(folder), default=0) >= after

        wait_until(far_enough, f"step {after}", every_s=0.005)
        time.sleep(draw.uniform(0, 0.1))  # anywhere in a step, a save or an evaluation
        assert command.running, command.log.read_text()
        if number == 2 and ranks > 1:  # one rank dies, and takes the others with it
            os.kill(draw.choice(ranks_of(command.pid)), signal.SIGKILL)
            assert command.wait() != 0
        else:
            command.kill()
    start(place, folder.name, ranks).finish()
    assert_same_end(folder, reference)
    assert len(steps(folder)) >= LAST_STEP


def test_runs_side_by_side_do_not_meet(place: Path) -> None:
    """The first one, at whose place stock would have the second one's ranks meet, ends early."""
    first = start(place, "first", 2, held_at=2)
    wait_until(lambda: steps(place / "checkpoints/first") or not first.running, "the first's start")
    second = start(place, "second", 2, held_at=2)
    folder = place / "checkpoints/second"
    wait_until(lambda: steps(folder) or not second.running, "the second's start")
    assert first.running
    second.let_go()
    first.kill()
    second.finish()
    assert steps(folder) == list(range(1, LAST_STEP + 1))


def test_submitted_without_a_scheduler_and_told_to_leave(place: Path, uninterrupted: Any) -> None:
    """submitit's local executor stands in; the save comes at a step boundary, nothing is redone."""
    ranks, reference = uninterrupted
    folder = reference.with_name(f"left{ranks}")
    command = argv(place, folder.name, ranks, "--submit", "--logdir", f"logs{ranks}")
    log = place / f"submit{ranks}.log"
    path = str(Path(sys.executable).parent)
    # one of the two in the processes that submitit starts for users
    how = {"fresh": True} if ranks == 1 else {"held_at": 6}
    submission = Command(command, place, log, PATH=path, **how)
    submission.finish()
    (logs,) = [path for path in (place / f"logs{ranks}").iterdir() if path.name.isdecimal()]
    controller = int(logs.name)
    wait_until(lambda: max(steps(folder), default=0) >= 5, "step 5")
    tasks = children(controller)
    assert len(tasks) == ranks
    for number in (signal.SIGTERM, signal.SIGUSR2):  # as a pre-emption has them
        for pid in tasks:
            os.kill(pid, number)
    if ranks > 1:
        submission.let_go()
    results = [logs / f"{controller}_{rank}_result.pkl" for rank in range(ranks)]
    wait_until(lambda: all(path.is_file() for path in results), "the job's end")
    said = "".join(path.read_text() for path in logs.glob("*_log.*"))
    assert "Requeued job" in said
    assert "Traceback" not in said
    assert steps(folder) == list(range(1, LAST_STEP + 1))
    assert_same_end(folder, reference)


def test_a_signal_during_set_up_requeues_the_run_as_it_was() -> None:
    given = {"submit": True, "checkpoint": "origin.pt", "timestamp_id": None}
    requeued = KDRunner().checkpoint(given)
    assert isinstance(requeued.function, KDRunner)
    assert requeued.args == (given,)


def test_several_nodes_need_a_scheduler(place: Path) -> None:
    log = place / "nodes.log"
    command = argv(place, "nodes", 1, "--submit", "--num-nodes", "2")
    assert Command(command, place, log, PATH=str(Path(sys.executable).parent)).wait() == 2
    assert "error: --num-nodes 2: there is no scheduler here" in log.read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(place: Path, uninterrupted: Any) -> None:
    ranks, reference = uninterrupted
    folder = reference.with_name(f"interrupted{ranks}")
    run = start(place, folder.name, ranks, held_at=3)
    wait_until(lambda: len(steps(folder)) >= 2, "two steps")
    os.kill(run.pid, signal.SIGINT)
    wait_until(lambda: "stopping at the end" in run.log.read_text(), "the signal's arrival")
    run.let_go()
    assert run.wait() == 130, run.log.read_text()
    said = run.log.read_text()
    assert said.count("stopping at the end of this step") == 1
    assert said.count("stopped after step") == 1
    assert "Traceback" not in said
    assert f"--timestamp-id {folder.name}" in said.strip().splitlines()[-1]
    assert (folder / "checkpoint.pt").exists()
    taken = steps(folder)
    assert f"stopped after step {taken[-1]} of {LAST_STEP}" in said
    start(place, folder.name, ranks).finish()
    assert steps(folder) == list(range(1, LAST_STEP + 1))  # no step was taken twice
    assert_same_end(folder, reference)


def test_one_rank_that_is_interrupted_stops_all_after_the_same_step(place: Path) -> None:
    folder = place / "checkpoints/alone"
    run = start(place, folder.name, 2, fresh=True)
    wait_until(lambda: len(steps(folder)) >= 2, "two steps")
    workers = ranks_of(run.pid)
    os.kill(workers[-1], signal.SIGINT)
    assert run.wait() == 130, run.log.read_text()
    said = run.log.read_text()
    assert f"stopped after step {steps(folder)[-1]} of {LAST_STEP}" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_does_not_wait(place: Path) -> None:
    folder = place / "checkpoints/twice"
    run = start(place, folder.name, 2, held_at=3)
    run.wait_held(2)  # a rank that waits for another one does not hear signals
    assert len(steps(folder)) >= 2
    workers = ranks_of(run.pid)
    os.kill(workers[-1], signal.SIGSTOP)  # no step ends any more
    os.kill(run.pid, signal.SIGINT)
    wait_until(lambda: "stopping at the end" in run.log.read_text(), "the first one's arrival")
    run.let_go()  # to wait for the other rank
    time.sleep(1.0)  # so that the second one is no repetition of the first
    assert run.running
    os.kill(run.pid, signal.SIGINT)
    os.kill(workers[-1], signal.SIGKILL)
    assert run.wait() == 130, run.log.read_text()
    assert "stopped at once" in run.log.read_text()
    wait_until(lambda: not any(map(cmdline, workers)), "the end of the ranks")
