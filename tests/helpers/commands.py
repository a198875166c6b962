"""The commands in processes that tests can watch and kill."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forks import fork_from_here_on
from trainings import PRELOAD, assert_same, config, write_lmdb, write_teacher, write_yaml

from fairchem_kd.commands import fairchem
from fairchem_kd.commands import main as fairchem_kd
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.training.records import read_records
from fairchem_kd.training.restartable import RestartableTrainer

#: How long anything may take here; machines may be busy.
PATIENCE_S = 1200.0
#: For how long a command may print nothing, once it does not compute either, ...
SILENCE_S = 600.0
#: ... which is less than this share of the time, whatever else the machine does.
IDLE = 0.01
#: The optimiser steps of the run that :func:`write_run` writes, whatever the number of ranks. In
#: real processes, which cannot be held, so many that none is over before it can be interrupted.
LAST_STEP = 40


def write_run(root: Path, last_step: int = LAST_STEP) -> Path:
    """``root/run.yml`` and its data: saved at every fourth step and evaluated at every fifth.

    Of small models, so that what is tested is what happens between the steps.
    """
    write_lmdb(root / "data" / "train", 12, seed=0)
    write_lmdb(root / "data" / "val", 6, seed=50)
    teacher = write_teacher(root, root / "data", "painn")
    arguments = config(
        root,
        root / "data",
        teacher=teacher,
        losses={"n2n": {"schedule": {"decay": "cosine"}}, "v2v": {}},
        # a pool of which all runs keep everything: what one run has in its store, and another one
        # asks about in its batches, would differ in the last bits
        distillation={"rattle": {"copies": 0.5, "std": 0.05, "pool": 4}},
        batch_size=3,
        checkpoint_every=4,
        eval_every=5,
        T_max=last_step,
    )
    arguments["model"].update(hidden_channels=8, num_layers=2)
    return write_yaml(root / "run.yml", arguments)


def run_argv(ranks: int, *more: str, last_step: int = LAST_STEP) -> list[str]:
    """The command that trains it, on ``ranks`` ranks in all, recording each step."""
    epochs = last_step * 3 * ranks // 12
    argv = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu", "--print-every", "1"]
    return [*argv, *more, f"--optim.max_epochs={epochs}"]


class Command:
    """``fairchem ARGV``, started in a process group of its own; its output goes to a file.

    Forked from a process that has the imports behind it, and so running within a second; the ranks,
    runs and jobs that it starts are forked in their turn.

    Args:
        of: the command, where it is another one; of "python", ``argv`` is the code.
        fresh: ranks, runs and jobs are started as they are for users.
        held_at: a training waits within this step for :meth:`let_go`, so that it is not over when
            a busy machine comes to interrupt it; ...
        held_run: ... of several, the one of this name.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path,
        log: Path,
        *,
        of: str = "fairchem",
        fresh: bool = False,
        held_at: int | None = None,
        held_run: str = "",
        **env: str,
    ) -> None:
        assert not (fresh and held_at), "only what is forked can be held"
        multiprocessing.set_forkserver_preload(PRELOAD)
        self.log = log
        self._holding = log.with_suffix(".held")
        hold = None
        if held_at is not None:
            self._holding.touch()
            hold = (held_at, held_run, self._holding)
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(
            target=_run, args=(argv, of, cwd, log, fresh, hold, env)
        )
        self.process.start()
        # where a test has failed before it came to this, Python would wait for its end for ever
        multiprocessing.util.Finalize(None, self.kill, exitpriority=10)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def wait_held(self, ranks: int) -> None:
        """Until so many of its ranks are held, and none of them waits for another one."""
        name = self._holding.name

        def all_held() -> bool:
            return len(list(self._holding.parent.glob(f"{name}.*"))) >= ranks or not self.running

        wait_until(all_held, "all ranks within one step")

    def let_go(self) -> None:
        """Hold it no longer."""
        self._holding.unlink()

    def kill(self) -> None:
        """SIGKILL it with all that it has started."""
        # it may have ended by itself, or have no group of its own yet
        with contextlib.suppress(ProcessLookupError):
            if self.running:
                os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code."""
        self.process.join(PATIENCE_S)
        assert not self.running, self.log.read_text()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def finish(self) -> None:
        """Wait for it to end well."""
        assert self.wait() == 0, self.log.read_text()


def _run(
    argv: Sequence[str],
    of: str,
    cwd: Path,
    log: Path,
    fresh: bool,
    hold: tuple[int, str, Path] | None,
    env: dict[str, str],
) -> None:
    gc.freeze()
    os.setsid()
    os.chdir(cwd)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **env})
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [of, *argv]
    if not fresh:
        fork_from_here_on()
    if hold is not None:
        _hold(*hold)
    if of == "python":
        (code,) = argv
        exec(code, {"__name__": "__main__"})
        sys.exit(0)
    main = {"fairchem": fairchem.main, "fairchem-kd": fairchem_kd.main}[of]
    sys.exit(main(argv))


def _hold(step: int, run: str, while_there: Path) -> None:
    """Have trainings, or one of them, wait within a step for as long as there is a file."""
    take = RestartableTrainer._backward

    def wait(trainer: RestartableTrainer, loss: Any) -> None:
        if not run or trainer.timestamp_id == run:
            deadline = time.monotonic() + PATIENCE_S
            if trainer.step >= step:
                while_there.with_name(f"{while_there.name}.{os.getpid()}").touch()
            while trainer.step >= step and while_there.exists():
                assert time.monotonic() < deadline, "let go by nobody"
                time.sleep(0.02)
        take(trainer, loss)

    RestartableTrainer._backward = wait  # type: ignore[method-assign]


def run_to_end(
    argv: Sequence[str], cwd: Path | None = None, silence_s: float = SILENCE_S, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command for as long as it prints or computes, on however busy a machine.

    Args:
        silence_s: after so much time without a sign of life it is killed, and the test fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            since, printed, used = time.monotonic(), 0, 0.0
            while True:
                try:
                    process.wait(min(5.0, silence_s / 4))
                    break
                except subprocess.TimeoutExpired:
                    pass
                now, size = time.monotonic(), sum(os.fstat(f.fileno()).st_size for f in (out, err))
                computed = cpu_seconds(process.pid)
                if size != printed or abs(computed - used) > IDLE * silence_s:
                    since, printed, used = now, size, computed
                assert now - since < silence_s, f"no sign of life in {silence_s:g} s: {argv}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(argv, process.returncode, *texts)


def cpu_seconds(session: int) -> float:
    """What the processes of a session have used so far, and those of them that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # after the command's name
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]  # after the command's name
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    return found


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""


def ranks_of(launcher: int) -> list[int]:
    """The ranks that it has launched."""
    return [pid for pid in children(launcher) if "resource_tracker" not in cmdline(pid)]


def wait_until(condition: Callable[[], Any], what: str, every_s: float = 0.02) -> Any:
    """Its first true value."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(every_s)


def steps(folder: Path) -> list[int]:
    """The training steps that a run has recorded so far."""
    if not (folder / "records.jsonl").is_file():
        return []
    return [record["step"] for record in read_records(folder, "train")]


def assert_same_end(folder: Path, expected: Path) -> None:
    """Two runs have left the same, bit for bit: weights, optimisers, EMA, random states, all."""
    for name in ("checkpoint.pt", "best_checkpoint.pt"):
        ended, reference = read_checkpoint(folder / name), read_checkpoint(expected / name)
        for key in reference.keys() - {"config"}:
            assert_same(ended[key], reference[key], f"{folder.name}/{name}: {key}")
