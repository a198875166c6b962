"""Python processes that are forked where they would be started, with the imports behind them.

Starting fairchem is seven seconds of imports; half of the suite's time went there. What is tested
through this is what processes do to one another; that they start at all is tested without it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.launcher.api import LaunchConfig

_FIRST_BEYOND_STDERR = 3


def fork_from_here_on() -> None:
    """Have this process, and all that it starts, fork Python and ranks where they would start them.

    For a process that has imports behind it, one thread, and none of a test's state: children are
    its own as ever, with the session, files, environment and folder that they are given.
    """
    from fairchem_kd.launch import run, stock_command

    subprocess.Popen = Popen  # type: ignore[misc]
    forking: Any = functools.partial(LaunchConfig, start_method="fork")
    stock_command.LaunchConfig = forking
    run.run_launched_rank = _without_handlers(run.run_launched_rank)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """The stock one, but for ``python -c CODE`` and ``python -m MODULE``, which are forked."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        if not options.get("shell") and is_python(args):
            sys.stdout.flush()
            sys.stderr.flush()
            env, keep = options.get("env"), tuple(options.get("pass_fds", ()))
            # What this is given runs between fork and exec; it never comes to the second.
            options["preexec_fn"] = functools.partial(_become, list(args), env, keep)
        super().__init__(args, *more, **options)


def is_python(args: Any) -> bool:
    """Whether this is a command of this Python with code or a module, and options known here."""
    if isinstance(args, (str, bytes, os.PathLike)) or not args or args[0] != sys.executable:
        return False
    try:
        _parsed(list(args))
    except ValueError:
        return False
    return True


def _parsed(args: Sequence[str]) -> tuple[Callable[[], Any], list[str], list[str]]:
    """What a Python's words run, its ``sys.argv``, and the options before it."""
    options = []
    words = list(args[1:])
    while words:
        word = words.pop(0)
        if word == "-u":
            options.append(word)
        elif word == "-W" and words and words[0] == "ignore":
            options.append(words.pop(0))
        elif word == "-c" and words:
            space = {"__name__": "__main__", "__builtins__": __builtins__}
            return functools.partial(exec, words[0], space), ["-c", *words[1:]], options
        elif word == "-m" and words:
            run = functools.partial(runpy.run_module, words[0], run_name="__main__", alter_sys=True)
            return run, [words[0], *words[1:]], options
        else:
            break
    raise ValueError(f"not forked: {args}")


def _become(args: list[str], env: Mapping[str, str] | None, keep: tuple[int, ...]) -> NoReturn:
    """Be the process that ``args`` would start; its folder, session and first files are set."""
    code = 1
    try:
        gc.freeze()  # what is no longer reachable here has files that are closed below
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= _FIRST_BEYOND_STDERR and int(name) not in keep:
                with contextlib.suppress(OSError):  # the one with which the list was read
                    os.close(int(name))
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        _forget_handlers()
        # their files are closed: with none of their own they start afresh
        multiprocessing.resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
        multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]
        multiprocessing.process._children = set()  # type: ignore[attr-defined]
        multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
        logging.root.handlers.clear()
        run, sys.argv, options = _parsed(args)
        _wait_for_folder(*sys.argv)
        sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if "ignore" in options:
            warnings.simplefilter("ignore")
        sys.stdout.reconfigure(write_through="-u" in options)  # type: ignore[union-attr]
        code = exit_code(run)
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait_for_folder(program: str, folder: str = "", *_: str) -> None:
    """submitit puts a job's folder in place after its start, which it counts on to take longer."""
    if program == "submitit.local._local":
        while not list(Path(folder.replace("%j", str(os.getpid()))).glob("*_submitted.pkl")):
            time.sleep(0.02)


def exit_code(run: Callable[[], Any]) -> int:
    """With which Python would end after this; what it would print is printed."""
    try:
        run()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forget_handlers() -> None:
    """Signals as a process has them that Python was started in."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _without_handlers(rank: Callable[..., None]) -> Callable[..., None]:
    """A rank that has none of its launcher's handlers of signals."""

    @functools.wraps(rank)
    def run(*given: Any) -> None:
        _forget_handlers()
        rank(*given)

    return run
