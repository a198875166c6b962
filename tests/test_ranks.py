"""Any number of ranks has the loss and the gradients of one rank on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from trainings import config, trainer, write_lmdb, write_teacher

# Unequal numbers of systems and of atoms per rank.
SHARES = {1: [[0, 1, 2, 3, 4]], 2: [[0], [1, 2, 3, 4]]}
LOSSES: dict[str, Any] = {
    "n2n": {"atoms": "free"},
    "e2n": {"projection": "mlp"},
    "v2v": {},
    "vanilla": {},
    "per_atom_energy": {},
}


def step(rank: int, world: int, root: Path, data: Path, teacher: Path) -> None:
    """One optimiser step of one rank; what it saw and got goes to a file."""
    store = root / f"store{world}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    arguments = config(root / str(world), data, teacher=teacher, losses=LOSSES, clip_grad_norm=0.5)
    with trainer(arguments) as built:
        built._set_up_distillation()
        built.step = 1
        built.model.train()
        batch = built.collater([built.train_dataset[i] for i in SHARES[world][rank]])
        loss = built._compute_loss(built._forward(batch), batch)
        built._backward(loss)
        shared = loss.detach().clone()
        dist.all_reduce(shared)
        names = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
        projections = dict(built.distillation.modules.named_parameters())
        result = {
            "loss": shared / world,
            "values": built.distillation.read_values(),
            "statistics": dict(built.distillation.modules.named_buffers()),
            "student": {name: p.grad for name, p in names.items()},
            "projections": {name: p.grad for name, p in projections.items()},
            "weights": {name: p.detach() for name, p in {**names, **projections}.items()},
        }
        torch.save(result, root / f"result{world}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_lmdb(data / "train", 11, seed=0)
    write_lmdb(data / "val", 4, seed=50)
    teacher = write_teacher(tmp_path / "teacher", data)
    for world in (1, 2):
        mp.spawn(step, (world, tmp_path, data, teacher), nprocs=world)
    one, first, second = (
        torch.load(tmp_path / f"result{name}", weights_only=True) for name in ("1.0", "2.0", "2.1")
    )
    assert first["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-5)
    assert first["values"] == pytest.approx(one["values"], rel=1e-5)
    for key in ("student", "projections"):
        for name, gradient in one[key].items():
            assert torch.equal(first[key][name], second[key][name]), name
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                first[key][name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9
            )
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for name, buffer in first["statistics"].items():
        assert torch.equal(buffer, second["statistics"][name]), name
