"""The Triton kernels: every test of edge_to_node again, interpreted on CPU and run on a GPU.

Triton decides when it is imported whether it interprets its kernels, so each is a process of its
own. The interpreter tests the kernels' logic; that they compile for CUDA needs no GPU either.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not for this platform"
)


def run_again(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         *arguments, str(TESTS / "test_ops.py")],
        cwd=TESTS.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_in_the_interpreter() -> None:
    # Triton 3.0's interpreter turns arrays of one number into numbers, of which NumPy warns
    quiet = ("-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    run_again(*quiet, TRITON_INTERPRET="1", EDGE_TO_NODE_WAYS="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_again(TRITON_INTERPRET="0", EDGE_TO_NODE_WAYS="triton", EDGE_TO_NODE_DEVICE="cuda")
