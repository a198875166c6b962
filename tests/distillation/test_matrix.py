"""Models of spherical harmonics with all others and every loss, in a loop without a trainer.

Two steps of what fits; of what does not, the reason. `test_pairs` has the other models, in whole
trainings.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from fairchem_kd import Distiller
from fairchem_kd.errors import UserError
from fairchem_kd.losses import known_losses, pair_atoms

SPHERICAL = ("equiformer_v2", "escn", "esen_hydra")
OTHERS = ("gemnet_oc", "painn", "schnet")
PAIRS = [
    (student, teacher)
    for student in (*SPHERICAL, *OTHERS)
    for teacher in (*SPHERICAL, *OTHERS)
    if student in SPHERICAL or teacher in SPHERICAL
]
EDGES = {"e2e", "e2n"}
VECTORS = {"v2v", "v2v_geometric"}


def refusals(student: str, teacher: str) -> dict[str, str]:
    """Of this pair, the losses that it cannot have, with the reason."""
    found = {}
    for kind in EDGES | VECTORS:
        if (student == "schnet" and kind in {"e2e"} | VECTORS) or teacher == "schnet":
            found[kind] = "SchNet has no"
    if teacher != "gemnet_oc":
        found["n2n_by_head"] = "no linear head of the teacher reads"
        found["v2v_by_head"] = "no linear head of the teacher reads"
    if student == "schnet" or teacher == "schnet":
        found["v2v_by_head"] = "SchNet has no"
    if student == "schnet":
        found["antisymmetric"] = "the student's are a slope"
    # of models that detach the frames of their edges autograd gives no slopes
    for who, model in (("teacher", teacher), ("student", student)):
        if model in SPHERICAL:
            found["jacobian"] = f"The {who}'s forces do not change"
            if who == "student":
                found["antisymmetric"] = found["jacobian"]
    return found


@pytest.fixture(scope="module")
def batch() -> Any:
    """Two structures, compared as a pair too, for which they have as many atoms."""
    made = models.batch([models.structures(1, seed=seed)[0] for seed in (0, 1)])
    made.pairs = pair_atoms(made.natoms, torch.tensor([[0, 1]]))
    return made


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_loss_trains_or_is_refused_with_the_reason(
    student: str, teacher: str, batch: Any
) -> None:
    model, frozen = models.small_model(student, seed=1), models.small_model(teacher, seed=2)
    refused = refusals(student, teacher)
    losses = {kind: {} for kind in known_losses() if kind not in refused}
    for kind, words in refused.items():
        with pytest.raises(UserError, match=words):  # noqa: PT012
            distiller = Distiller(model, frozen, {kind: {}})
            with distiller.watch(batch.clone()):
                model(batch.clone())
    distiller = Distiller(model, frozen, losses)
    distiller.fit([batch])
    optimizer = torch.optim.SGD([*model.parameters(), *distiller.parameters()], 1e-6)
    for _ in range(2):
        own = batch.clone()
        with distiller.watch(own):
            model(own)
        loss = distiller.loss()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in distiller.parameters())
        reached = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(grad).all()) for grad in reached)
        assert any(bool(grad.any()) for grad in reached)
        optimizer.step()
    noted = distiller.values()
    for kind in losses:
        assert any(name.split(".")[0] == kind for name in noted), kind
