"""Features of turned, reflected, moved and permuted structures."""

from __future__ import annotations

import models
import pytest
import torch
from captures import FLAVOURS, small
from captures import float64 as float64

from fairchem_kd.testing import MOVES, check_symmetry


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


#: The activations of EquiformerV2 are functions on a grid on the sphere.
ON_A_GRID = 2e-4


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scalars_are_invariant_and_vectors_turn(flavour: str, kind: str) -> None:
    if kind == "reflection" and flavour in models.SPHERICAL:
        pytest.skip("not by construction; see test_spherical.py")
    # fairchem keeps cells in float32, and with them the distances to periodic images
    tolerance = 2e-5 if flavour.startswith("gemnet_oc") else 2e-6
    if flavour.startswith("equiformer") and kind == "rotation":
        tolerance = ON_A_GRID
    slabs = [models.to_data(atoms, dtype=torch.float64) for atoms in models.structures(2)]
    check_symmetry(small(flavour), slabs, kind, tolerance=tolerance)
