"""edge_to_node's ways of computing, a graph for it, and the loops it has to equal.

Every test of a module that imports `way` runs once with each: on its own, with the three ways on
CPU; test_ops_triton.py runs it again with the Triton kernels, in Triton's interpreter and, where
there is one, on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairchem_kd.ops import cpu, operators, segments

DEVICE = os.environ.get("EDGE_TO_NODE_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = os.environ.get("EDGE_TO_NODE_WAYS", "plain,cpu,segments").split(",")
TAKES_PLAIN = cpu.takes_plain


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Every test runs with each way of computing, on the device of this run."""
    if request.param == "triton":
        from fairchem_kd.ops import triton_kernels as backend
    else:
        backend = {"plain": cpu, "cpu": cpu, "segments": segments}[request.param]
    if DEVICE != "cpu":  # there, the choice is under test too
        assert operators.backend_for(DEVICE) is backend
    monkeypatch.setattr(operators, "backend_for", lambda device_type: backend)
    # every size here is small
    monkeypatch.setattr(cpu, "takes_plain", lambda *_, **__: request.param == "plain")
    previous = torch.get_default_device()
    torch.set_default_device(DEVICE)
    yield request.param
    torch.set_default_device(previous)


def reference(features, target, num_nodes, vectors, reduce):
    scalar = torch.zeros(num_nodes, features.shape[1], dtype=torch.float64)
    vector = torch.zeros(num_nodes, 3, features.shape[1], dtype=torch.float64)
    degree = [0] * num_nodes
    for e, i in enumerate(target.tolist()):
        degree[i] += 1
        scalar[i] += features[e].double()
        for k in range(3):
            vector[i, k] += vectors[e, k].double() * features[e].double()
    if reduce == "mean":
        for i in range(num_nodes):
            scalar[i] /= max(degree[i], 1)
            vector[i] /= max(degree[i], 1)
    return scalar, vector


def graph(num_edges, num_nodes, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    features = torch.randn(num_edges, channels, generator=generator, dtype=torch.float64)
    vectors = torch.randn(num_edges, 3, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    target = torch.randint(num_nodes, (num_edges,), generator=generator)
    return features.to(dtype), vectors.to(dtype), target


class Recorder(TorchDispatchMode):
    """Names of the operations that run, and the largest floating-point result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                dense = tensor if tensor.layout == torch.strided else tensor.values()
                self.largest = max(self.largest, dense.numel())
        return result
