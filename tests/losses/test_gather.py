"""Rows of all ranks: their order, and a loss over them that is the same on one rank as on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from terms import random
from trainings import start_ranks

from fairchem_kd.losses import Part, gather_rows


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - CKA of ``(N, C)`` and ``(N, D)``: of the whole batch, no mean over its atoms."""
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    cross = (student.T @ teacher).square().sum()
    return 1 - cross / ((student.T @ student).norm() * (teacher.T @ teacher).norm())


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of the student ``(9, 4)``, its weight ``(4, 3)``, features of the teacher."""
    return random(9, 4), random(4, 3, seed=1), random(9, 5, seed=2)


def own_rows(rank: int, cut: int) -> slice:
    return slice(0, cut) if rank == 0 else slice(cut, 9)


def loss(part: Part, world: int) -> torch.Tensor:
    """What a rank runs backward: DDP then averages the gradients over ranks."""
    sums = torch.stack([part.total.detach(), torch.tensor(float(part.count)).double()])
    if world > 1:
        dist.all_reduce(sums)
    return part.total * world / sums[1]


def rank_main(rank: int, world: int, root: Path) -> None:
    for cut in (6, 9):  # with 9 the second rank has no rows
        inputs, weight, teacher = data()
        weight.requires_grad_()
        rows = own_rows(rank, cut)
        theirs = gather_rows(teacher[rows])
        assert torch.equal(theirs, teacher)
        assert not theirs.requires_grad
        assert torch.equal(gather_rows(torch.arange(9)[rows]), torch.arange(9))
        ours = gather_rows(inputs[rows] @ weight)
        # every rank has the whole value, so each counts once
        loss(Part("", 1.0, similarity(ours, theirs), 1), world).backward()
        whole = weight.grad.clone()
        # or each rank sums up its own rows, compared with all
        weight.grad = None
        mine = inputs[rows] @ weight
        distances = torch.cdist(mine, gather_rows(mine)).square()
        loss(Part("", 1.0, distances.sum(), distances.numel()), world).backward()
        grads = torch.stack([whole, weight.grad])
        dist.all_reduce(grads)
        torch.save((similarity(ours, theirs).detach(), grads / world), root / f"{rank}-{cut}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    start_ranks(rank_main, 2, root)
    return root


@pytest.mark.parametrize("cut", [6, 9])
def test_two_ranks_have_the_loss_and_gradient_of_one(ranks: Path, cut: int) -> None:
    inputs, weight, teacher = data()
    weight.requires_grad_()
    value = similarity(inputs @ weight, teacher)
    (whole,) = torch.autograd.grad(value, weight)
    student = inputs @ weight
    (pairs,) = torch.autograd.grad(torch.cdist(student, student).square().mean(), weight)
    for rank in range(2):
        their_value, (their_whole, their_pairs) = torch.load(
            ranks / f"{rank}-{cut}.pt", weights_only=True
        )
        torch.testing.assert_close(their_value, value.detach())
        torch.testing.assert_close(their_whole, whole)
        torch.testing.assert_close(their_pairs, pairs)


def test_one_rank_has_its_own_rows() -> None:
    rows = random(3, 2)
    assert gather_rows(rows) is rows
