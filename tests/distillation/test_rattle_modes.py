"""Displacements by other rules than plain noise, in opposite pairs, and where the models differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import slabs
from trainings import assert_equal, config, trainer, weights, write_teacher
from trainings import data as data

from fairchem_kd.distillation.adversary import bounded, stepped
from fairchem_kd.distillation.companions import AdversarialOptions, RattleOptions, Rattler
from fairchem_kd.distillation.companions.join import Companions
from fairchem_kd.distillation.companions.rattle import BY_FORCE, displacement
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.schema import parse
from fairchem_kd.teachers.slopes import forces_and_slopes

WHERE = "task.distillation.rattle"


def rattler(seed: int = 0, **options: Any) -> Rattler:
    return Rattler(parse(RattleOptions, options, WHERE), seed)


def with_forces(number: int = 2) -> Any:
    batch = slabs(number)
    batch.forces = torch.randn(batch.pos.shape, generator=torch.Generator().manual_seed(4))
    return batch


@pytest.mark.parametrize("mode", ["plain", "fixed_length", *BY_FORCE])
def test_displacements_are_those_of_a_loop(mode: str) -> None:
    draw = np.random.default_rng(0)
    noise, forces = draw.normal(size=(20, 3)), draw.normal(size=(20, 3))
    forces[3] = 0.0
    found = displacement(mode, noise, forces)
    for z, f, got in zip(noise, forces, found, strict=True):
        length = sum(x * x for x in f) ** 0.5
        unit = [x / length if length else 0.0 for x in f]
        along = sum(a * b for a, b in zip(z, unit, strict=True))
        own = sum(x * x for x in z) ** 0.5
        expected = {
            "plain": list(z),
            "fixed_length": [3**0.5 * x / own for x in z],
            "without_force": [x - along * u for x, u in zip(z, unit, strict=True)],
            "along_force": [along * u for u in unit],
            "around_force": [x + u for x, u in zip(z, unit, strict=True)],
        }[mode]
        assert got == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["fixed_length", *BY_FORCE])
def test_copies_go_by_the_mode_and_keep_what_is_fixed(mode: str) -> None:
    batch = with_forces()
    made = rattler(copies=1, std=0.02, mode=mode)(batch, 1)
    assert made is not None
    shift = (made.pos - batch.pos).double()
    free = batch.fixed == 0
    assert bool((shift[~free] == 0).all())
    forces = torch.nn.functional.normalize(batch.forces.double(), dim=1)
    along = (shift * forces).sum(1)[free]
    if mode == "fixed_length":
        torch.testing.assert_close(
            shift[free].norm(dim=1), torch.full_like(along, 3**0.5 * 0.02), rtol=1e-3, atol=1e-5
        )
    elif mode == "without_force":
        assert float(along.abs().max()) < 1e-5
    elif mode == "along_force":
        torch.testing.assert_close(shift[free].norm(dim=1), along.abs(), rtol=1e-3, atol=1e-5)
    else:
        assert float(along.mean()) > 0.01


@pytest.mark.parametrize("pool", [None, 4])
def test_antithetic_copies_are_pairs_around_their_structure(pool: int | None) -> None:
    batch = slabs(3)
    make = rattler(copies=2, std=[0.02, 0.05], antithetic=True, pool=pool)
    whole = Companions(make, None).joined(batch, 1)
    assert whole.rattled.tolist() == [False] * 3 + [True] * 6
    for number in range(3):
        first, second, _ = whole.pairs[whole.pairs[:, 2] == number].T
        middle = (whole.pos[first] + whole.pos[second]) / 2
        sizes = batch.natoms.tolist()
        start = [i for i in range(3) if sizes[i] == len(first)]
        assert any(torch.allclose(middle, batch.pos.split(sizes)[i], atol=1e-5) for i in start)
        assert float((whole.pos[first] - whole.pos[second]).abs().max()) > 0.01
    if pool is not None:  # each of a pair has a number of its own
        plus, minus = (make.from_pool(batch, number).pos for number in (2, 3))
        torch.testing.assert_close((plus + minus) / 2, batch.pos, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("draws", "size"), [(float("inf"), 8), (4, 2), (0.2, 2)])
def test_a_pool_of_pairs_is_even(draws: float, size: int) -> None:
    options = parse(RattleOptions, {"antithetic": True, "pool": 8}, WHERE)
    assert Rattler(options, 0, draws).pool == size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "sideways"}, "mode cannot be 'sideways'"),
        ({"antithetic": True, "pool": 3}, "pool is 3, and with antithetic"),
        ({"antithetic": 1}, "true or false"),
        ({"adversarial": {}}, "is of mode: adversarial, and the mode is plain"),
        ({"mode": "adversarial", "antithetic": True}, "not in opposite pairs"),
        ({"mode": "adversarial", "adversarial": {"steps": 0}}, "steps must be at least 1"),
        ({"mode": "adversarial", "adversarial": {"rate": 0}}, "rate must be greater than 0"),
        ({"mode": "adversarial", "adversarial": {"rate": "nan"}}, "rate must be a number"),
        ({"mode": "adversarial", "adversarial": {"bound": "cube"}}, "bound cannot be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(RattleOptions, options, WHERE)


def test_steps_without_any_pair_are_refused() -> None:
    options = parse(RattleOptions, {"antithetic": True, "copies": 0.5}, WHERE)
    options.check_pairs(3)
    with pytest.raises(UserError, match=r"of 1 structures a step makes no .* at least 2"):
        options.check_pairs(1)


def test_forces_that_are_not_there_are_refused() -> None:
    batch = slabs(2)
    del batch.forces
    with pytest.raises(UserError, match="which these structures do not have"):
        rattler(copies=1, mode="along_force")(batch, 1)
    block = {"rattle": {"mode": "along_force"}, "unlabelled": {"dataset": {"src": "x"}}}
    batch = slabs(8)
    batch.forces = torch.zeros_like(batch.pos)
    with pytest.raises(UserError, match="moves nothing, where no atom has a force"):
        rattler(copies=1, mode="along_force")(batch, 1)
    with pytest.raises(UserError, match="unlabelled have none"):
        parse_distillation({"distillation": block})


def test_a_step_of_the_ascent_is_the_rule() -> None:
    gradient, forces = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    one = stepped(AdversarialOptions(rate=0.02), gradient, forces)
    torch.testing.assert_close(one.norm(dim=1), torch.full((6,), 0.02).double())
    two = stepped(AdversarialOptions(rate=0.02, bound="ball", off_force=True), gradient, forces)
    for row, g, f in zip(two, gradient, forces, strict=True):
        unit = f / f.norm()
        torch.testing.assert_close(row, 0.02 * (g - (g @ unit) * unit))
    lengths = bounded(torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]]), 1.0).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.1]))


def test_adversarial_copies_are_where_the_models_differ_more(tmp_path: Path, data: Path) -> None:
    """And a training on them repeats bit for bit."""
    teacher = write_teacher(tmp_path / "teacher", data, "painn")
    rattle = {"copies": 1, "std": 0.01, "mode": "adversarial",
              "adversarial": {"steps": 3, "rate": 0.02, "force_penalty": 0.0}}  # fmt: skip
    given = config(
        tmp_path, data, teacher=teacher, losses={"vanilla": {}}, distillation={"rattle": rattle},
        max_epochs=1,
    )  # fmt: skip
    ends = []
    for _ in range(2):
        with trainer(given) as built:
            built.train(disable_eval_tqdm=True)
            ends.append(weights(built))
            if len(ends) == 1:
                continue
            adversary, distillation = built.companions.adversary, built.distillation
            batch = built.collater([built.train_dataset[i] for i in range(3)])
            start = built.companions.rattler(batch, 1)
            moved = adversary(start)
            shift = moved.pos - start.pos
            assert 0.02 < float(shift.norm(dim=1).max()) <= 0.0601
            assert bool((shift[start.fixed == 1] == 0).all())
            assert all(p.grad is None or p.grad.isfinite().all() for p in built.model.parameters())
            before, after = (_apart(distillation, one) for one in (start, moved))
            assert float(after.mean()) > 1.05 * float(before.mean())
            # what cannot be moved without atoms coming close stays where it began
            built.companions.rattler.too_close = lambda *_: [True, False, False]
            held = adversary(start)
            atoms = int(start.natoms[0])
            assert torch.equal(held.pos[:atoms], start.pos[:atoms])
            assert torch.equal(held.pos[atoms:], moved.pos[atoms:])
    assert_equal(ends[0], ends[1])


def _apart(distillation: Any, batch: Any) -> torch.Tensor:
    """``(B,)``: the mean square of the difference of both models' forces."""
    theirs, _ = forces_and_slopes(distillation.teacher, batch)
    distillation.student.eval()
    with torch.no_grad():
        ours = distillation.student(batch.clone())["forces"].double()
    ours = distillation.units.physical("forces", ours, batch)
    square = torch.where(batch.fixed[:, None] == 0, (ours - theirs).square(), 0.0).sum(1)
    return torch.zeros(len(batch.natoms), dtype=square.dtype).index_add(0, batch.batch, square)


def test_adversarial_copies_need_forces_of_both() -> None:
    from fairchem_kd.distillation.adversary import Adversary

    options = parse(RattleOptions, {"mode": "adversarial"}, WHERE)
    bare = SimpleNamespace(teacher=None, targets={}, device="cpu")
    with pytest.raises(UserError, match="which a store alone does not have"):
        Adversary(bare, Rattler(options, 0))  # type: ignore[arg-type]
