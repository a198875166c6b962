"""The projections in a training: their rate, their clipping, their scaler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import FEATURE_LOSSES, assert_equal, config, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.training import ranks


def test_the_projections_learn_and_follow_the_students_schedule(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    arguments["task"]["distillation"]["projections"] = {"lr": 0.1, "clip_grad_norm": 0.5}
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        (group,) = built.projections.optimizer.param_groups
        # the rate that the last step was taken with: after 3 of 8 cosine steps
        rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 8)).item())
        assert group["lr"] == pytest.approx(0.1 * rate, rel=1e-6)
        grads = torch.cat([p.grad.flatten() for p in built.projections.parameters])
        assert grads.norm().item() == pytest.approx(0.5, rel=1e-4)  # clipped, by itself
        first = built.distillation.terms["n2n"].projection.weight
        other = config(tmp_path / "b", data, teacher=teacher, losses={"n2n": {}})
        assert first.abs().sum() > 0
    with trainer(other) as fresh:
        fresh.set_up()
        assert not torch.equal(fresh.distillation.terms["n2n"].projection.weight, first)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the trainer's autocast is CUDA's
def test_projections_follow_the_amp_scaler(tmp_path: Path, data: Path, teacher: Path) -> None:
    """Scaled, they end as without a scaler; where the scaler skips a step, they skip it too."""
    results = []
    for scaled in (False, True):
        arguments = config(tmp_path, data, teacher=teacher, losses=FEATURE_LOSSES, max_epochs=1)
        with trainer(arguments) as built:
            if scaled:
                built.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            built.train(disable_eval_tqdm=True)
            projections = dict(built.distillation.modules.named_parameters())
            ended = {k: v.detach().clone() for k, v in projections.items()}
            results.append({**weights(built), **ended})
            if scaled:
                batch = next(iter(built.train_loader))
                loss = built._compute_loss(built._forward(batch), batch)
                built._backward(built.scaler.scale(loss * float("inf")))
                assert_equal(ended, {k: v.detach() for k, v in projections.items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_term_whose_schedule_has_ended_keeps_its_projection(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several ranks too, whose averaging makes gradients of zeros of none."""
    losses = {"n2n": {}, "early": {"kind": "n2n", "schedule": {"stop": 0.25}}}
    ended: list[torch.Tensor] = []
    with trainer(config(tmp_path, data, teacher=teacher, losses=losses)) as built:
        built.set_up()
        monkeypatch.setattr(ranks, "world_size", lambda: 2)  # of which the other does the same
        monkeypatch.setattr(ranks.dist, "all_reduce", lambda values: values.mul_(2))
        built.model.train()
        batch = next(iter(built.train_loader))
        for built.step in (1, 2, 3, 4):
            built._backward(built._compute_loss(built._forward(batch.clone()), batch.clone()))
            ended.append(built.distillation.terms["early"].projection.weight.detach().clone())
    assert not torch.equal(ended[0], ended[1])
    assert torch.equal(ended[1], ended[3])
