"""A SLURM for the tests of this folder: the one at hand, or one that is started for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CLUSTER = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find a cluster."""
    if answers("sinfo", {}):
        yield {}
        return
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip(f"no SLURM here; as root on Debian, `{CLUSTER} install` gives the tests one")
    folder = tempfile.mkdtemp(prefix="slurm")  # a short path: munge's socket is in it
    started = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True)
    if started.returncode != 0:
        pytest.skip(f"SLURM does not start here: {started.stderr.strip()[-500:]}")
    try:
        yield {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def answers(command: str, env: dict[str, str]) -> bool:
    if shutil.which(command) is None:
        return False
    done = subprocess.run(
        [command, "-h"], env={**os.environ, **env}, capture_output=True, timeout=60
    )
    return done.returncode == 0
