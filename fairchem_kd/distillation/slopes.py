"""Whether forces of both models can be differentiated, looked at before the first step.

Some models detach a part of how they look at positions (EquiformerV2, eSCN and eSEN with direct
forces the rotations of edges): autograd then gives, without a word, something else than the slope
of their forces. These are known; of others finite differences along a random direction show it, as
far as what is left out counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairchem_kd.errors import UserError
from fairchem_kd.features.architecture import detaches_positions
from fairchem_kd.models.frozen import shaped_outputs
from fairchem_kd.random_state import isolated_random_state, same_draws
from fairchem_kd.stock.positions import followed
from fairchem_kd.teachers.slopes import force_slopes, live_members
from fairchem_kd.training.checks import check_finite

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from torch_geometric.data import Batch

    from fairchem_kd.distillation.statistics import Collate
    from fairchem_kd.distillation.terms import Distillation

SAMPLES = 8  # of the training set, evenly spread
#: Å: less drowns in the rounding of fp32, more in curvature, and in forces that jump where one of
#: many neighbours that are as near is exchanged for another
STEPS = (5e-3, 1e-3, 2e-4)
APART = 0.2  # relative difference, over the structures, that is no rounding

Forces = Callable[["Batch"], Tensor]
Slopes = Callable[["Batch", Tensor], Tensor]


def check_slopes(distillation: Distillation, dataset: Dataset, collate: Collate) -> None:
    """Compare slopes of forces by autograd with finite differences; neither model is changed.

    Only where a term needs them.

    Raises:
        UserError: those of one of the models are something else, or cannot be had.
    """
    if not distillation.follows_positions:
        return
    size = len(dataset)  # type: ignore[arg-type]
    number = min(SAMPLES, size)
    batch = collate([dataset[i * size // number] for i in range(number)])
    check_finite(batch, ())
    check_slopes_on(batch.to(distillation.device), distillation)


def check_slopes_on(batch: Batch, distillation: Distillation) -> None:
    """`check_slopes` on the structures of a batch, on the device.

    Raises:
        UserError: as of that.
    """
    student: Any = distillation.student

    target = {"forces": distillation.targets["forces"]}

    def own(given: Batch) -> Tensor:
        return shaped_outputs(student(given), target, given, "the student")["forces"]

    def own_slopes(given: Batch, cotangent: Tensor) -> Tensor:
        given.pos = given.pos.detach().requires_grad_(True)
        with torch.enable_grad(), followed(student):
            forces = own(given)
            if not forces.requires_grad:
                raise UserError(
                    "The student's forces cannot be differentiated with respect to positions: take "
                    "the loss jacobian_antithetic, or another student."
                )
            return torch.autograd.grad(forces, given.pos, cotangent.to(forces))[0].detach()

    members = live_members(distillation.teacher) if distillation.needs_slopes else []

    def theirs(given: Batch) -> Tensor:
        return torch.stack([one.teach(given, ()).outputs["forces"] for one in members]).mean(0)

    models = [("The student", student)]
    models += [("The teacher", one.frozen.model) for one in members]
    for who, model in models:
        if detaches_positions(model):
            raise _detached(who)
    training = student.training
    student.eval()
    try:
        with isolated_random_state():
            _compare("The student", own, own_slopes, batch)
            if members:
                _compare(
                    "The teacher",
                    theirs,
                    lambda given, one: force_slopes(distillation.teacher, given, [one])[0],
                    batch,
                )
    finally:
        student.train(training)


def _compare(who: str, forces: Forces, slopes: Slopes, batch: Batch) -> None:
    """Refuse slopes that are not those of finite differences, with steps of any length.

    Free atoms alone are moved: in the layers of a slab that are held many neighbours are exactly as
    near, and any step exchanges some.

    Raises:
        UserError: naming the model and the difference.
    """
    generator = torch.Generator().manual_seed(0)
    shape = batch.pos.shape
    along, cotangent = (
        torch.randn(shape, generator=generator).to(batch.pos.device) for _ in range(2)
    )
    free = (batch.fixed == 0) if "fixed" in batch else torch.zeros(())
    if free.any():
        along = along * free[:, None]
    with same_draws(batch.pos.device):
        slope = slopes(batch.clone(), cotangent).double()
    by_autograd = _per_structure(slope * along, batch)
    found = []
    for step in STEPS:
        ends = []
        for sign in (1, -1):
            moved = batch.clone()
            moved.pos = batch.pos.detach() + sign * step * along
            with torch.no_grad(), same_draws(moved.pos.device):
                ends.append(forces(moved).double())
        by_difference = _per_structure((ends[0] - ends[1]) / (2 * step) * cotangent, batch)
        apart = float((by_autograd - by_difference).abs().median())
        scale = float(torch.maximum(by_autograd.abs(), by_difference.abs()).median())
        if not apart > APART * scale:
            return
        found.append((apart / scale, apart, scale))
    _, apart, scale = min(found)
    raise _detached(who, f" (by {apart:.3g}, where {scale:.3g} is usual)")


def _detached(who: str, by: str = "") -> UserError:
    return UserError(
        f"{who}'s forces do not change with positions as autograd says{by}: its model leaves parts "
        "out of its gradient, as EquiformerV2, eSCN and eSEN do, so that a loss on slopes has none "
        "to compare; take jacobian_antithetic."
    )


def _per_structure(values: Tensor, batch: Batch) -> Tensor:
    """Sums of ``(N, 3)`` over each structure, ``(B,)``."""
    return values.new_zeros(len(batch.natoms)).index_add(0, batch.batch, values.sum(1))
