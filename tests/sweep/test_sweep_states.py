"""The state of each run of a sweep: its file, its process, its job."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from sweeps import place as place
from sweeps import write

from fairchem_kd.processes import this_process
from fairchem_kd.sweep.job import claim, note_submitted
from fairchem_kd.sweep.local import _note_stop
from fairchem_kd.sweep.log import ATTEMPT, last_words
from fairchem_kd.sweep.manifest import expand
from fairchem_kd.sweep.scheduler import Jobs, known_jobs
from fairchem_kd.sweep.state import Status, read_state, status, statuses, write_state
from fairchem_kd.sweep.submit import SweepJob


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
