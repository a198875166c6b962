"""Losses of one's own, by name and by path, and terms as modules of a trainer."""

from __future__ import annotations

import pytest
import torch
from terms import WHERE, batch, feature_loss, value
from torch import nn

from fairchem_kd.errors import UserError
from fairchem_kd.losses import Loss, LossInputs, Part, known_losses, loss_class, register_loss


class Constant(Loss):
    """A loss of another package, named by its path."""

    def forward(self, inputs):
        return [Part("", 1.0, torch.ones(()), None)]


def test_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setattr("fairchem_kd.losses.base._LOSSES", known_losses())
    registered = register_loss("constant")(Constant)
    assert loss_class("constant", WHERE) is registered
    term = loss_class("constant", WHERE).from_options({"coefficient": 2}, WHERE)
    assert (term.kind, term.coefficient) == ("constant", 2.0)
    assert value(term(LossInputs(batch()))) == 1.0
    with pytest.raises(ValueError, match="'n2n' exists already"):
        register_loss("n2n")(Constant)


def test_a_loss_by_its_path():
    assert loss_class(f"{__name__}.Constant", WHERE) is Constant
    for path, message in (
        ("no_such_package.Loss", "cannot be imported"),
        ("fairchem_kd.losses.NoSuchLoss", "cannot be imported"),
        ("torch.nn.Linear", "is not a subclass of fairchem_kd.losses.Loss"),
        ("n3n", r"unknown kind 'n3n' \(did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            loss_class(path, WHERE)


def test_terms_are_modules_that_a_trainer_can_hold():
    without_weights = loss_class("vanilla", WHERE).from_options({}, WHERE)
    terms = nn.ModuleDict({"a": feature_loss("n2n"), "b": without_weights})
    assert {name.split(".")[0] for name, _ in terms.named_parameters()} == {"a"}
    assert {"a.standardizer.scale", "a.projection.weight"} <= set(terms.state_dict())
