"""A teacher or a training that is not finite anywhere: said, and never in the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import ALL_LOSSES, config, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.errors import UserError
from fairchem_kd.teachers import LiveTeacher, Taught
from fairchem_kd.training.records import read_records


def spoil(monkeypatch: pytest.MonkeyPatch, which: Any, value: float) -> None:
    """Have the teacher say ``value`` of the structures with these numbers in their batch."""
    teach = LiveTeacher.teach

    def spoiled(self: LiveTeacher, batch: Any, requests: Any, **more: Any) -> Taught:
        said = teach(self, batch, requests, **more)
        outputs = {name: values.clone() for name, values in said.outputs.items()}
        for system in which(batch) if outputs else ():  # the statistics ask for features alone
            outputs["energy"][system] = value
            outputs["forces"][batch.batch == system] = value
        return replace(said, outputs=outputs)

    monkeypatch.setattr(LiveTeacher, "teach", spoiled)


def small(batch: Any) -> list[int]:
    """About a quarter of the structures, whatever their batch."""
    return [i for i, sid in enumerate(batch.sid) if int(sid) % 4 == 0]


@pytest.mark.parametrize("store", ["off", "auto"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_structures_of_which_the_teacher_says_nonsense_do_not_count(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, value: float,
    store: str,
) -> None:  # fmt: skip
    spoil(monkeypatch, small, value)
    own = {"checkpoint": str(teacher), "store": store}
    given = config(tmp_path, data, distillation={"teacher": own, "losses": ALL_LOSSES})
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        assert all(bool(value.isfinite().all()) for value in weights(built).values())
        folder = built.config["cmd"]["checkpoint_dir"]
    shares = [r["metrics"].get("untrusted", 0.0) for r in read_records(folder, "train")]
    assert 0.1 < sum(shares) / len(shares) < 0.5


@pytest.mark.parametrize("losses", [{"vanilla": {}}, {"n2n": {}, "vanilla": {}}])
def test_a_teacher_that_says_nothing_else_ends_the_run(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, losses: Any
) -> None:
    spoil(monkeypatch, lambda batch: range(len(batch.natoms)), float("nan"))
    own = {"checkpoint": str(teacher), "store": "off"}
    given = config(tmp_path, data, distillation={"teacher": own, "losses": losses})
    with (
        trainer(given) as built,
        pytest.raises(UserError, match=r"Step 1: of 100% of the structures .* NaN"),
    ):
        built.train(disable_eval_tqdm=True)


def test_a_training_that_diverges_stops_before_the_step(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data, lr_initial=1e30, checkpoint_every=1)) as built:
        with pytest.raises(UserError, match=r"Step \d: .* diverged, .*not taken"):
            built.train(disable_eval_tqdm=True)
        assert built.step > 1
        assert all(bool(value.isfinite().all()) for value in weights(built).values())


def test_gradients_that_are_not_finite_are_not_taken(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data)) as built:
        before = weights(built)
        parameter = next(p for p in built.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: torch.full_like(grad, float("nan")))
        with pytest.raises(UserError, match="Step 1: gradients are NaN or infinite"):
            built.train(disable_eval_tqdm=True)
        for name, value in weights(built).items():
            assert torch.equal(value, before[name])


def test_an_answer_that_is_finite_comes_back_as_it_is() -> None:
    natoms = torch.tensor([2, 1])
    outputs = {"energy": torch.ones(2, 1), "other": torch.full((2, 1), float("nan"))}
    said = Taught(natoms, outputs, {}, atom_energies={"energy": torch.ones(3, 1)})
    assert said.sound(["energy"]) is said
    spoiled = replace(said, atom_energies={"energy": torch.tensor([[1.0], [float("inf")], [1.0]])})
    sound = spoiled.sound(["energy"])
    assert sound.trusted.tolist() == [False, True]
    assert sound.atom_energies["energy"].tolist() == [[1.0], [0.0], [1.0]]
    assert spoiled.sound(["other"]).trusted.tolist() == [False, False]
