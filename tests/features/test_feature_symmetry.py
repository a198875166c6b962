"""Features of turned, reflected, moved and permuted structures."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from captures import FLAVOURS, batch, extract, small
from captures import float64 as float64


def transformed(slabs: list, kind: str) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Moved copies of ``slabs``, the matrix Q that their vectors turn with, the atoms' order."""
    generator = torch.Generator().manual_seed(7)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    rotation = rotation * rotation.det()
    matrix, moved, order, start = torch.eye(3), [], [], 0
    if kind in ("rotation", "reflection"):
        matrix = rotation if kind == "rotation" else -rotation
    for index, atoms in enumerate(slabs):
        energies = atoms.calc
        copy = atoms.copy()
        permutation = torch.arange(len(atoms))
        if kind == "permutation":
            permutation = torch.randperm(len(atoms), generator=generator)
            copy = copy[permutation.numpy()]
        if kind == "translation":
            copy.positions += [1.7, -2.3, 3.1 + index]
        copy.set_cell(copy.cell.array @ matrix.numpy().T, scale_atoms=False)
        copy.positions = copy.positions @ matrix.numpy().T
        copy.calc = type(energies)()
        moved.append(copy)
        order.append(permutation + start)
        start += len(atoms)
    return moved, matrix, torch.cat(order)


def edge_order(feature: Any, order: torch.Tensor | None = None) -> torch.Tensor:
    """Sort edges by target, source and cell offset, so that two graphs can be compared."""
    source, target = feature.edge_index if order is None else order[feature.edge_index]
    keys = torch.stack([target, source, *feature.cell_offsets.long().T]).tolist()
    return torch.tensor(sorted(range(len(source)), key=lambda e: [row[e] for row in keys]))


KINDS = ["rotation", "reflection", "translation", "permutation"]
#: The activations of EquiformerV2 are functions on a grid on the sphere.
ON_A_GRID = 5e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scalars_are_invariant_and_vectors_turn(flavour: str, kind: str) -> None:
    if kind == "reflection" and flavour in models.SPHERICAL:
        pytest.skip("not by construction; see test_spherical.py")
    model = small(flavour)
    slabs = models.structures(2)
    moved, matrix, order = transformed(slabs, kind)
    before, _ = extract(model, batch(slabs), detach=True)
    after, _ = extract(model, batch(moved), detach=True)
    for request, feature in before.items():
        expected, values = feature.values, after[request].values
        if request.form == "vector":
            expected = torch.einsum("xy,nyc->nxc", matrix.to(expected.dtype), expected)
        if request.form == "edge":
            expected = expected[edge_order(feature)]
            values = values[edge_order(after[request], order)]
        else:
            expected = expected[order]
        # fairchem keeps cells in float32, and with them the distances to periodic images
        scale = expected.abs().max()
        tolerance = 2e-5 if values.dtype == torch.float32 else 2e-6
        if flavour.startswith("equiformer") and kind == "rotation":
            tolerance = ON_A_GRID
        torch.testing.assert_close(
            values / scale,
            expected / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda m, r=request: f"{r}: {m}",
        )
