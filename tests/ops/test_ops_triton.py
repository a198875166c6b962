"""The Triton kernels: every test of edge_to_node again, interpreted on CPU and run on a GPU.

Triton decides when it is imported whether it interprets its kernels, so each is a process of its
own. The interpreter tests the kernels' logic; that they compile for CUDA needs no GPU either.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
AGAIN = sorted(str(path) for path in TESTS.glob("ops/test_edge_to_node_*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not for this platform"
)


def run_again(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         *arguments, *AGAIN],
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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton would interpret")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_cuda_without_atomics(capability: int, dtype: str) -> None:
    import triton.language as tl

    from fairchem_kd.ops import triton_kernels as kernels

    values = {"features", "nodes", "out"}
    pointers = {**dict.fromkeys(values, f"*{dtype}"), "vectors": "*fp32", "perm": "*i64",
                "offsets": "*i64"}  # fmt: skip
    block_c, block_e, warps = kernels.block_sizes(512, 4 if dtype == "fp32" else 2, 13_000)
    common = {"HAS_PERM": True, "MEAN": True, "TYPE": tl.float32}
    both = {**common, "SCALAR": True, "VECTOR": True, "BLOCK_C": block_c, "BLOCK_E": block_e}
    for kernel, constants in (
        (kernels._nodes_kernel, both),
        (kernels._edges_kernel, both),
        (kernels._dots_kernel, {**common, "BLOCK_C": 128, "BLOCK_E": 16}),
    ):
        compiled = compile_for_cuda(kernel, pointers, constants, warps, capability)
        assert f"sm_{capability}" in compiled["ptx"]
        assert not re.search(r"\b(atom|red|ld\.local|st\.local)\.", compiled["ptx"])
        assert len(compiled["cubin"]) > 0


def compile_for_cuda(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, capability: int
) -> Any:
    """What Triton makes of ``kernel`` for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: pointers.get(n, "i32") for n in names if n not in constants}
    if "constexprs" in inspect.signature(ASTSource).parameters:  # since Triton 3.2
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel, {n: signature[n] for n in names},
            {(names.index(n),): value for n, value in constants.items()},
        )  # fmt: skip
    else:
        source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
