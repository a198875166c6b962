"""Schedules in a training: what counts at a step, what does not, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import assert_equal, config, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.errors import UserError
from fairchem_kd.training.records import read_records

STEPS = 8
N2N, VANILLA = {"schedule": {"stop": 0.5}}, {"schedule": {"start": 0.5}}


def run(root: Path, data: Path, teacher: Path, losses: Any, **labels: Any) -> dict:
    """The weights at the end, from distillation by ``losses``."""
    given = config(root, data, teacher=teacher, losses=losses)
    if labels:
        given["task"]["distillation"]["labels"] = labels
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


def test_features_first_and_outputs_afterwards(tmp_path: Path, data: Path, teacher: Path) -> None:
    run(tmp_path, data, teacher, {"n2n": N2N, "vanilla": VANILLA}, schedule={"start": 0.25})
    (folder,) = tmp_path.glob("checkpoints/*-test")
    seen = {r["step"]: r["metrics"] for r in read_records(folder, "train")}
    assert sorted(seen) == list(range(1, STEPS + 1))
    for step, values in seen.items():
        assert ("n2n" in values) == (step <= 4)
        assert ("vanilla.energy" in values) == (step > 4)
        assert (values["label_loss"] > 0) == (step > 2)
        weighted = [v for k, v in values.items() if k.endswith("_weighted")]
        assert values["loss"] == pytest.approx(sum(weighted) + values["label_loss"], rel=1e-5)


def test_what_has_ended_leaves_plain_training(tmp_path: Path, data: Path, teacher: Path) -> None:
    """Bit for bit the steps of stock from there on, and the teacher is not asked any more."""
    given = config(tmp_path, data, teacher=teacher, losses={"n2n": {"schedule": {"stop": 2}}})
    given["task"]["distillation"]["rattle"] = {"copies": 0.5, "std": 0.05}
    with trainer(given) as built:
        built.set_up()
        batch = next(iter(built.train_loader))
        for step, distils in ((2, True), (3, False)):
            built.step = step
            built.model.train()
            built.optimizer.zero_grad()
            with torch.random.fork_rng():
                loss = built._compute_loss(built._forward(batch.clone()), batch)
            plain = OCPTrainer._compute_loss(
                built, OCPTrainer._forward(built, batch.clone()), batch
            )
            assert (loss.item() != plain.item()) is distils
            projections = [p.clone() for p in built.projections.parameters]
            built._backward(loss)
            moved = [
                not torch.equal(a, b)
                for a, b in zip(projections, built.projections.parameters, strict=True)
            ]
            assert all(moved) if distils else not any(moved)


def test_labels_without_weight(tmp_path: Path, data: Path, teacher: Path) -> None:
    """The teacher's word alone, and half of the labels: neither is plain training."""
    alone = run(tmp_path / "a", data, teacher, {"vanilla": {}}, coefficient=0)
    half = run(tmp_path / "b", data, teacher, {"vanilla": {}}, coefficient=0.5)
    whole = run(tmp_path / "c", data, teacher, {"vanilla": {}})
    given = run(tmp_path / "d", data, teacher, {"vanilla": {}}, coefficient=1)
    assert_equal(whole, given)
    name = next(iter(whole))
    assert len({tuple(w[name].flatten().tolist()) for w in (alone, half, whole)}) == 3


@pytest.mark.parametrize(
    ("losses", "labels", "step"),
    [
        ({"n2n": {"schedule": {"start": 0.5}}}, {"coefficient": 0}, 1),
        ({"n2n": {"schedule": {"start": 0.5}}}, {"schedule": {"start": 2}}, 1),
        ({"n2n": {"schedule": {"stop": 3}}}, {"schedule": {"start": 0.5}}, 4),
        ({"n2n": {"schedule": {"stop": 0.5}}}, {"schedule": {"stop": 6}}, 7),
    ],
)
def test_steps_that_learn_nothing_are_refused(
    tmp_path: Path, data: Path, teacher: Path, losses: Any, labels: Any, step: int
) -> None:
    with pytest.raises(UserError, match=f"at step {step} of 8 neither the labels nor a loss"):
        run(tmp_path, data, teacher, losses, **labels)
