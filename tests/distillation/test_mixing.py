"""Labels and teacher share the structures of a step out: the paper's weights, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import config, trainer, write_lmdb, write_teacher
from trainings import data as data

from fairchem_kd.distillation.companions import UnlabelledOptions
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.schema import parse

WHERE = "task.distillation.unlabelled"


@pytest.mark.parametrize(("share", "q"), [(0.5, 1.0), (0.5, 2.0), (0.75, 0.3)])
def test_the_factors_are_the_formula_and_keep_the_sum(share: float, q: float) -> None:
    options = parse(UnlabelledOptions, {"dataset": {}, "share": share, "weight": q}, WHERE)
    labels, other = options.mixing(8)
    number = options.per_step(8)
    r = number / (8 + number)
    w = 1 / (1 - r + q * r)
    assert labels == pytest.approx((1 - r) * w)
    assert other == pytest.approx(q * w)
    # were all losses alike, their weighted mean over a step would be as large
    assert labels + r * other == pytest.approx(1.0)


def test_a_step_weighs_labels_and_teacher_as_a_loop_does(tmp_path: Path, data: Path) -> None:
    more = write_lmdb(tmp_path / "more", 4, seed=90)
    teacher = write_teacher(tmp_path / "teacher", data, "painn")
    block = {"dataset": {"format": "lmdb", "src": str(more)}, "share": 0.5, "weight": 2.0}
    given = config(
        tmp_path, data, teacher=teacher, losses={"vanilla": {"coefficient": 3.0}},
        distillation={"unlabelled": block},
    )  # fmt: skip
    with trainer(given) as built:
        built.set_up()
        built.step = 1
        batch = next(iter(built.train_loader))
        whole = built.companions.joined(batch.clone(), 1)
        assert len(whole.natoms) == 6
        taught = built.distillation.teacher.teach(whole, built.distillation.teacher_requests)
        built.model.train()
        with torch.no_grad():
            out = built._unwrapped_model(whole.clone())
        units = built.distillation.units
        said = {n: units.normalized(n, v, whole).float() for n, v in taught.outputs.items()}
        loss = built.take_step(batch.clone())
        values = built.distillation.values.read()
    w = 1 / (1 - 0.5 + 2.0 * 0.5)
    energies = forces = 0.0
    atom, free = 0, 0
    for system, number in enumerate(whole.natoms.tolist()):
        weight = 2.0 * w if system >= 3 else 0.0
        energies += weight * abs(float(out["energy"][system]) - float(said["energy"][system]))
        for row in range(atom, atom + number):
            if whole.fixed[row] == 0:
                free += 1
                forces += weight * float((out["forces"][row] - said["forces"][row]).norm())
        atom += number
    assert values["vanilla.energy"] == pytest.approx(energies / 6, rel=1e-3)
    assert values["vanilla.forces"] == pytest.approx(forces / free, rel=1e-3)
    plain = config(tmp_path / "plain", data, losses=None)
    with trainer(plain) as built:
        alone = built.take_step(batch.clone())
    assert values["label_loss"] == pytest.approx(0.5 * w * alone, rel=1e-4)
    weighted = values["vanilla.energy_weighted"] + values["vanilla.forces_weighted"]
    assert loss == pytest.approx(values["label_loss"] + weighted, rel=1e-4)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"unlabelled": {"dataset": {}, "weight": 0}}, "weight must be greater than 0"),
        ({"unlabelled": {"dataset": {}, "weight": "nan"}}, "weight must be a number"),
        ({"unlabelled": {"dataset": {}, "weight": True}}, "weight must be a number"),
        ({"unlabelled": {"dataset": {}, "weight": 1}, "rattle": {}}, "copies belong to neither"),
        ({"unlabelled": {"dataset": {}, "weight": 1}, "losses": {"n2n": {}}}, "there is none"),
    ],
)
def test_what_does_not_go_together_is_refused(block: dict[str, Any], words: str) -> None:
    given = {"teacher": {"checkpoint": "t.pt"}, "losses": {"vanilla": {}}, **block}
    with pytest.raises(UserError, match=words):
        parse_distillation({"distillation": given})
