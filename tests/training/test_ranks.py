"""Any number of ranks trains like one rank on the same global batches."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairchem.core.trainers import OCPTrainer
from torch.utils.data import Subset
from trainings import (
    assert_same,
    config,
    start_ranks,
    trainer,
    weights,
    write_splits,
    write_teacher,
)

from fairchem_kd.distillation.trainer import DistillationTrainer
from fairchem_kd.errors import UserError

# Unequal numbers of systems and of atoms per rank.
SHARES = {1: [[0, 1, 2, 3, 4]], 2: [[0], [1, 2, 3, 4]], 3: [[0], [1, 2, 3], [4]]}
LOSSES: dict[str, Any] = {
    "n2n": {"atoms": "free"},
    "e2n": {"projection": "mlp"},
    "v2v": {},
    "vanilla": {},
    "per_atom_energy": {},
    "early": {"kind": "n2n", "student": "node@1"},  # reaches some of the parameters only
}

#: Those of one step beside them: on edges, and over the atoms of all ranks.
MORE_LOSSES: dict[str, Any] = {
    "e2e": {"atoms": "free"},
    "cka": {"atoms": "free"},
    "gsp": {},
    "lsp": {"edges": "teacher"},
    "relational": {"pairs": 50},
    "v2v_geometric": {"atoms": "free"},
    "n2n_by_head": {},
    "jacobian": {"rows": 2},
    "jacobian_antithetic": {},
    "antisymmetric": {"probes": 3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_splits(root, train=(12, 0), val=(6, 50), more=(7, 80), other=(7, 90))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, list[dict]]:
    """What each rank saw and got, by the number of ranks."""
    root = tmp_path_factory.mktemp("ranks")
    teacher = write_teacher(root / "teacher", data)
    for world in SHARES:
        start_ranks(one_rank, world, root, data, teacher)
    return {
        world: [
            torch.load(root / f"result{world}.{rank}", weights_only=True) for rank in range(world)
        ]
        for world in SHARES
    }


def one_rank(rank: int, world: int, root: Path, data: Path, teacher: Path) -> None:
    """A step and a training of one rank; what it saw and got goes to a file."""
    # alone there is no other to differ from; of two what is said of three goes without saying
    others = {1: ["data"], 2: [], 3: OTHER_FILES}[world]
    result = {
        "step": step(rank, world, root, data, teacher),
        "training": training(world, root, data, teacher),
        "evaluation": evaluation(world, root, data, teacher),
        "refusals": [refusal(rank, root, data, teacher, other) for other in others],
    }
    torch.save(result, root / f"result{world}.{rank}")


def step(rank: int, world: int, root: Path, data: Path, teacher: Path) -> dict[str, Any]:
    """One optimiser step."""
    arguments = config(
        root / str(world),
        data,
        teacher=teacher,
        losses=LOSSES | MORE_LOSSES,
        distillation={"rattle": {"copies": 2, "antithetic": True}},
        clip_grad_norm=0.5,
    )
    arguments["outputs"]["forces"]["train_on_free_atoms"] = False  # stock's loss needs some
    with trainer(arguments) as built:
        built.set_up()
        built.step = 1
        built.model.train()
        structures = [built.train_dataset[i] for i in SHARES[world][rank]]
        for structure in structures:
            if structure.sid == built.train_dataset[0].sid:  # alone on its rank
                structure.fixed = torch.ones_like(structure.fixed)  # n2n of free atoms has none
        batch = built.collater(structures)
        loss = built._compute_loss(built._forward(batch), batch)
        built._backward(loss)
        shared = loss.detach().clone()
        dist.all_reduce(shared)
        names = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
        projections = dict(built.distillation.modules.named_parameters())
        return {
            "loss": (shared / world).item(),
            "values": built.distillation.values.read(),
            "statistics": dict(built.distillation.modules.named_buffers()),
            "student": {name: p.grad for name, p in names.items()},
            "projections": {name: p.grad for name, p in projections.items()},
            "weights": {name: p.detach() for name, p in {**names, **projections}.items()},
        }


def training(world: int, root: Path, data: Path, teacher: Path) -> dict[str, Any]:
    """Three epochs of two global batches, with everything that has a state of its own."""
    arguments = config(
        root / f"training{world}",
        data,
        teacher=teacher,
        losses=LOSSES,
        batch_size=6 // world,
        eval_batch_size=6 // world,
        max_epochs=3,
        eval_every=1,
        lr_initial=1e-3,
        # Adam would make steps of full length out of gradients that are nothing but rounding.
        optimizer="SGD",
        optimizer_params={"momentum": 0.9, "weight_decay": 0.1},
        scheduler="ReduceLROnPlateau",
        mode="min",
        factor=0.5,
        patience=0,
        threshold=0.5,  # every other evaluation falls short of it
        clip_grad_norm=0.5,
    )
    arguments["task"]["distillation"] |= {
        "validate": True,
        "rattle": {"copies": 1},
        "unlabelled": {"dataset": {"format": "lmdb", "src": str(data / "more")}, "share": 0.5},
    }
    with trainer(arguments) as built:
        start = weights(built)
        built.train(disable_eval_tqdm=True)
        assert any(not torch.equal(v, start[k]) for k, v in weights(built).items())
        return {
            "weights": weights(built),
            "projections": {
                name: p.detach().clone()
                for name, p in built.distillation.modules.named_parameters()
            },
            "ema": [p.clone() for p in built.ema.shadow_params],
            "rate": built.scheduler.get_lr(),
            "best": built.best_val_metric,
            "groups": [group["weight_decay"] for group in built.optimizer.param_groups],
        }


def evaluation(world: int, root: Path, data: Path, teacher: Path) -> dict[str, Any]:
    """The metrics of seven structures, ours and stock's."""
    found = {}
    for name, cls in (("ours", DistillationTrainer), ("stock", OCPTrainer)):
        arguments = config(root / f"{name}{world}", data, eval_batch_size=2)
        if name == "ours":
            arguments["task"] = {
                "distillation": {
                    "teacher": {"checkpoint": str(teacher)},
                    "losses": {"n2n": {}},
                    "statistics_samples": 2,
                    "validate": True,
                }
            }
        arguments["dataset"]["val"]["src"] = str(data / "more")
        with trainer(arguments, cls) as built:
            built.ema = None
            if name == "ours":
                built.set_up()
            metrics = built.validate(split="val", disable_tqdm=True)
            found[name] = {key: float(metrics[key]["metric"]) for key in METRICS}
    return found


METRICS = ("energy_mae", "forces_mae", "loss")
#: Keys of the config whose files one rank sees otherwise, and what is said of it.
OTHER_FILES = {
    "data": r"dataset\.train is not the same on every rank: 12 samples .* 11 samples .* on rank 1 ",
    "teacher": r"task\.distillation\.teacher\.checkpoint is not the same on every rank: \d+ bytes",
    "more": r"task\.distillation\.unlabelled is not the same on every rank: 7 samples",
    "missing": r".*no-such-folder",
}


def refusal(rank: int, root: Path, data: Path, teacher: Path, other: str) -> str:
    """What is said where rank 1 has another file under a path that all ranks have."""
    arguments = config(
        root / "refusals",
        data,
        teacher=teacher,
        losses={"n2n": {}},
        distillation={"unlabelled": {"dataset": {"format": "lmdb", "src": str(data / "more")}}},
    )
    with trainer(arguments) as built:
        if rank == 1 and other == "data":
            built.train_loader = SimpleNamespace(dataset=Subset(built.train_dataset, range(11)))
        distillation = built.distillation_config
        if rank == 1 and other == "teacher":
            copy = root / "other.pt"
            copy.write_bytes(teacher.read_bytes() + b"more")
            distillation.teacher.checkpoint = str(copy)
        if rank == 1 and other in ("more", "missing"):
            src = data / "other" if other == "more" else data / "no-such-folder"
            distillation.unlabelled.dataset["src"] = str(src)
        try:
            built.check_ranks()
            built.set_up()
        except (UserError, AssertionError, OSError) as error:
            return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_are_those_of_one_rank(results: Any, world: int) -> None:
    (one,), ranks = results[1], results[world]
    one, ranks = one["step"], [rank["step"] for rank in ranks]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert rank["values"] == pytest.approx(one["values"], rel=1e-5)
        for key in ("student", "projections", "weights", "statistics"):
            assert_same(rank[key], ranks[0][key], key)
    for key in ("student", "projections"):
        for name, gradient in one[key].items():
            assert gradient.abs().max() > 0, name
            close(ranks[0][key][name], gradient, name)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_training_ends_where_one_rank_ends(results: Any, world: int) -> None:
    """EMA, clipping, weight decay and a schedule that follows the evaluation, over some steps."""
    (one,), ranks = results[1], results[world]
    one, ranks = one["training"], [rank["training"] for rank in ranks]
    for rank in ranks:
        assert_same(rank, ranks[0], "ranks")
    assert one["rate"] < 1e-3  # the plateau was reached
    assert ranks[0]["rate"] == one["rate"]
    assert ranks[0]["best"] == pytest.approx(one["best"], rel=1e-4)
    assert ranks[0]["groups"] == one["groups"] == [0, 0.1]
    for key in ("weights", "projections"):
        for name, value in one[key].items():
            close(ranks[0][key][name], value, name)
    for mine, theirs in zip(ranks[0]["ema"], one["ema"], strict=True):
        close(mine, theirs, "ema")


def close(left: torch.Tensor, right: torch.Tensor, name: str) -> None:
    """Equal to rounding, seen against the largest element."""
    atol = 1e-5 * right.abs().max().item() + 1e-9
    torch.testing.assert_close(left, right, rtol=1e-4, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_are_stocks(results: Any, world: int) -> None:
    """Of seven structures: where ranks cannot share them evenly, some count twice, as in stock."""
    for rank in results[world]:
        assert rank["evaluation"]["ours"] == rank["evaluation"]["stock"]
        assert rank["evaluation"] == results[world][0]["evaluation"]
    exact = results[1][0]["evaluation"]["ours"]
    assert results[world][0]["evaluation"]["ours"] == pytest.approx(exact, rel=0.3)


@pytest.mark.slow
def test_ranks_that_see_other_files_say_so(results: Any) -> None:
    """Each of them, at once."""
    assert results[1][0]["refusals"] == [""]
    for rank in results[3]:
        for said, expected in zip(rank["refusals"], OTHER_FILES.values(), strict=True):
            assert re.match(expected, said)
