"""A backend's own answer to a small question, before it is relied on.

A kernel is compiled by what happens to be installed, for the GPU that happens to be there. One
small graph per process shows whether that gives the right sums; where it does not, the plain
PyTorch way is taken, which is slower and right everywhere.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from fairchem_kd.ops.order import edge_order

if TYPE_CHECKING:
    from fairchem_kd.ops.backend import Backend


@torch.no_grad()
def agrees(backend: Backend, reference: Backend, device_type: str) -> bool:
    """Whether two backends give the same sums and derivatives on a small graph.

    An error counts as disagreement. Waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 5, generator=generator).to(device_type)
    vectors = torch.randn(7, 3, generator=generator).to(device_type)
    nodes = torch.randn(4, 4, 5, generator=generator).to(device_type)
    target = torch.tensor([2, 0, 2, 3, 2, 0, 3]).to(device_type)  # atom 1 has no edges
    order = edge_order(target, 4, check=False)
    dtype = torch.float32

    def results(way: Backend) -> list[torch.Tensor]:
        return [
            way.nodes(features, vectors, order, True, False, dtype),
            way.edges(nodes, vectors, order, True, False, dtype),
            way.dots(features, nodes[:, 1:].contiguous(), order, False, dtype),
        ]

    try:
        pairs = list(zip(results(backend), results(reference), strict=True))
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
    except Exception as error:  # whatever a compiler or a driver makes of it
        logging.debug(f"{backend}: {error}")
        return False
