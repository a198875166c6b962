"""A SLURM for the tests of this folder, started for them; no other is ever submitted to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CLUSTER = Path(__file__).with_name("cluster.sh")
OWN = "fairchemkdtests"  # as the script names it


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find the tests' own cluster."""
    if cluster_name() == OWN:  # started by hand, and SLURM_CONF set
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


def cluster_name() -> str:
    """What the cluster at hand calls itself; empty where there is none that answers."""
    if shutil.which("scontrol") is None:
        return ""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    named = re.search(r"^ClusterName\s*=\s*(\S+)", shown.stdout, re.MULTILINE)
    return named.group(1) if named and shown.returncode == 0 else ""
