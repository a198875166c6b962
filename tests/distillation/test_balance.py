"""Factors of terms that follow the training: the rules, their state, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import assert_equal, config, trainer, weights, write_teacher
from trainings import data as data

from fairchem_kd.distillation.balance import Balance, BalanceOptions
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.training.records import read_records

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"), data, "painn")


def test_factors_by_gradients_are_those_of_a_loop() -> None:
    options = BalanceOptions("gradient_norm", every=5, target=0.5, momentum=0.8)
    balance = Balance(options, ["a", "b"], CPU)
    assert [balance.looks(step, ["a", "b"]) for step in (1, 5)] == [True, True]
    raw = [(4.0, 8.0, 1.0), (6.0, 2.0, 0.5), (5.0, 1.0, 0.0)]  # labels, a, schedule of a
    factor = None
    for labels, own, scheduled in raw:
        now = 1.0 if factor is None else factor
        found = {"labels_grad_norm": torch.tensor(labels),
                 "a_grad_norm": torch.tensor(own * now * scheduled),
                 "b_grad_norm": torch.tensor(0.0)}  # fmt: skip
        balance.learn_gradients(found, "labels", {"a": scheduled, "b": 1.0})
        if scheduled:
            wanted = 0.5 * labels / own
            factor = wanted if factor is None else 0.8 * factor + 0.2 * wanted
        assert float(balance.of("a")) == pytest.approx(factor)
    assert float(balance.of("b")) == 1.0  # no gradient, nothing to go by
    assert [balance.looks(step, ["a", "b"]) for step in (6, 10)] == [False, True]


def test_the_first_gradient_of_labels_that_begin_later_counts_whole() -> None:
    balance = Balance(BalanceOptions("gradient_norm", every=5), ["a"], CPU)
    for labels, factor in ((0.0, 1.0), (8.0, 4.0), (16.0, 0.9 * 4.0 + 0.1 * 8.0)):
        again = Balance(balance.options, ["a"], CPU)
        again.load_state_dict(balance.state_dict())
        own = torch.tensor(2.0) * balance.of("a")
        found = {"labels_grad_norm": torch.tensor(labels), "a_grad_norm": own}
        for one in (balance, again):
            one.learn_gradients(found, "labels", {"a": 1.0})
            assert float(one.of("a")) == pytest.approx(factor)
    assert not balance.looks(6, ["a"])


def test_factors_by_uncertainty_bring_each_weighted_term_to_1() -> None:
    balance = Balance(BalanceOptions("uncertainty", rate=0.1), ["a", "b"], CPU)
    log = 0.0
    for _ in range(200):
        balance.learn_values({"a": torch.tensor(20.0), "b": torch.tensor(0.0)})
        log += max(-1.0, min(1.0, 0.1 * (1 - torch.tensor(log).exp().item() * 20.0)))
        assert float(balance.of("a").log()) == pytest.approx(log, abs=1e-5)
    assert float(balance.of("a")) * 20.0 == pytest.approx(1.0, abs=1e-3)
    assert float(balance.of("b")) == 1.0
    balance.learn_values({"a": torch.tensor(float("nan"))})
    assert float(balance.of("a")) * 20.0 == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["gradient_norm", "uncertainty"])
def test_a_balanced_training_goes_on_bit_for_bit(
    tmp_path: Path, data: Path, teacher: Path, kind: str
) -> None:
    losses = {"n2n": {"schedule": {"warmup_steps": 2}}, "vanilla": {}}
    often = {"every": 2} if kind == "gradient_norm" else {}
    given = config(
        tmp_path, data, teacher=teacher, losses=losses, checkpoint_every=3,
        distillation={"balance": {"kind": kind, **often}},
    )  # fmt: skip
    with trainer(given, timestamp_id="whole") as built:
        built.train(disable_eval_tqdm=True)
        assert built._watch.asked == {"n2n", "vanilla"}  # nobody has to be told of their weights
        whole, learned = weights(built), built.distillation.balance.state_dict()
        place = Path(built.config["cmd"]["checkpoint_dir"])
    steps = [r["metrics"] for r in read_records(place) if r["kind"] == "train"]
    assert steps[0]["vanilla_balance"] == 1.0
    assert steps[-1]["vanilla_balance"] != 1.0
    assert steps[-1]["n2n_balance"] != steps[-1]["vanilla_balance"]
    with trainer(given, timestamp_id="broken") as built:
        built.config["optim"]["max_epochs"] = 1
        built.train(disable_eval_tqdm=True)
    with trainer(given, timestamp_id="broken") as built:
        built.train(disable_eval_tqdm=True)
        assert_equal(weights(built), whole)
        again = built.distillation.balance.state_dict()
        assert_equal(again["logs"], learned["logs"])


@pytest.mark.parametrize(
    ("balance", "words"),
    [
        ("gradient_nrm", r"cannot be 'gradient_nrm' \(did you mean 'gradient_norm'\?\)"),
        ({"kind": "equal"}, "kind cannot be 'equal'"),
        ({"every": 0}, "every must be at least 1"),
        ({"momentum": 1}, "momentum must be at most 0.999"),
        ({"target": True}, "target must be a number"),
        ({"rate": "nan"}, "rate must be a number"),
        ({"limit": 1}, "limit must be greater than 1"),
        (["uncertainty"], "balance must be"),
        (
            {"kind": "uncertainty", "target": 0.1},
            r"balance\.target is of gradient_norm, and the kind",
        ),
        ({"rate": 0.1}, r"balance\.rate is of uncertainty, and the kind is gradient_norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(balance: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_distillation({"distillation": {"balance": balance}})


def test_gradients_of_labels_that_do_not_count_are_refused() -> None:
    block = {"balance": "gradient_norm", "labels": {"coefficient": 0}}
    with pytest.raises(UserError, match="goes by the gradient of the labels' loss"):
        parse_distillation({"distillation": block})
    assert parse_distillation({"distillation": {"balance": "uncertainty"}}).balancing is not None
