"""The look at gradients: right, in the records, and without a trace in the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import assert_equal, config, trainer, weights, write_splits, write_teacher

from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.distillation.gradients import compared_gradients
from fairchem_kd.errors import UserError
from fairchem_kd.training.records import read_records


def test_norms_and_cosines_are_those_of_the_gradients() -> None:
    a = torch.nn.Parameter(torch.tensor([1.0, 2.0]).double())
    b = torch.nn.Parameter(torch.tensor(3.0).double())
    labels = (a * torch.tensor([3.0, 0.0])).sum()  # gradient (3, 0; 0)
    terms = {
        "along": 2 * a[0],
        "against": -a[0] + b,  # (-1, 0; 1)
        "across": a[1] * b,  # (0, 3; 2)
        "none": torch.tensor(1.0),
    }
    found = compared_gradients(terms, ("label_loss", labels), [a, b])
    expected = {
        "label_loss_grad_norm": 3.0,
        "along_grad_norm": 2.0,
        "along_grad_cosine": 1.0,
        "against_grad_norm": 2**0.5,
        "against_grad_cosine": -(0.5**0.5),
        "across_grad_norm": 13**0.5,
        "across_grad_cosine": 0.0,
        "none_grad_norm": 0.0,
        "none_grad_cosine": 0.0,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value), name
    assert a.grad is b.grad is None
    sum([labels, *terms.values()]).backward()  # the graph is still there


def run(root: Path, data: Path, teacher: Path, every: int) -> tuple[dict[str, Any], list[Any]]:
    losses = {"n2n": {}, "vanilla": {}}
    block = {"diagnostics": {"every": every}}
    given = config(root, data, teacher=teacher, losses=losses, distillation=block, max_epochs=1)
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        return weights(built), [r for r in read_records(folder) if r["kind"] == "train"]


def test_every_so_many_steps_the_records_have_them(tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data", train=(11, 0), val=(4, 50))
    teacher = write_teacher(tmp_path / "teacher", data, "painn")
    with_, records = run(tmp_path / "with", data, teacher, 3)
    names = {
        "label_loss_grad_norm", "n2n_grad_norm", "n2n_grad_cosine", "vanilla_grad_norm",
        "vanilla_grad_cosine",
    }  # fmt: skip
    for record in records:
        found = {n for n in record["metrics"] if "_grad_" in n}
        assert found == (names if record["step"] == 3 else set()), record["step"]
        for name in found:
            value = record["metrics"][name]
            assert value > 0 if name.endswith("norm") else abs(value) <= 1
    without, _ = run(tmp_path / "without", data, teacher, 0)
    assert_equal(with_, without)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": -1}, "diagnostics.every must be at least 0"),
        ({"every": 2.5}, "diagnostics.every"),
        ({"every": True}, "diagnostics.every"),
        ({"often": 3}, "diagnostics has an unknown key 'often'"),
        (7, "diagnostics must be a mapping"),
    ],
)
def test_options_that_do_not_fit(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_distillation({"distillation": {"diagnostics": given}})
    assert parse_distillation({"distillation": {"diagnostics": {"every": "5"}}}).diagnostics.due(10)
