"""The check that a backend has to pass before it is relied on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairchem_kd.ops import cpu, segments
from fairchem_kd.ops.selfcheck import agrees


def test_right_backends_pass() -> None:
    assert agrees(cpu, segments, "cpu")


@pytest.mark.parametrize("broken", ["nodes", "edges", "dots"])
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_backend_that_is_wrong_or_fails_does_not(broken: str, how: str) -> None:
    def fail(*args: Any) -> torch.Tensor:
        if how == "raises":
            raise RuntimeError("PassManager::run failed")
        result = getattr(cpu, broken)(*args)
        result[0] += 0.01
        return result

    ways = {name: getattr(cpu, name) for name in ("nodes", "edges", "dots")}
    assert not agrees(SimpleNamespace(**{**ways, broken: fail}), segments, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_the_triton_kernels_pass_in_the_interpreter() -> None:
    code = (
        "from fairchem_kd.ops import segments, triton_kernels\n"
        "from fairchem_kd.ops.selfcheck import agrees\n"
        "assert agrees(triton_kernels, segments, 'cpu')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
