"""The statistics that a teacher's features are standardised with."""

from __future__ import annotations

import pytest
import torch
from terms import WHERE, feature_inputs, feature_loss, random, standardised

from fairchem_kd.errors import UserError
from fairchem_kd.losses.standardize import FLOOR, Standardizer


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_streamed_statistics_equal_those_of_the_whole(kind):
    shape = (50, 3, 4) if kind == "vector" else (50, 4)
    values = random(*shape) * torch.tensor([1.0, 3.0, 0.2, 50.0]) + 2.0
    whole, streamed = Standardizer(kind, 4), Standardizer(kind, 4)
    whole.update(values)
    for piece in values.split([1, 20, 0, 29]):
        streamed.update(piece)
    for standardizer in (whole, streamed):
        standardizer.finalize()
    torch.testing.assert_close(streamed.scale, whole.scale, rtol=1e-6, atol=0)
    want = standardised(values, range(50))
    torch.testing.assert_close(streamed(values), want, rtol=1e-5, atol=1e-5)


def test_large_means_do_not_cancel():
    values = random(1000, 2) * 1e-3 + 1e6
    standardizer = Standardizer("node", 2)
    for piece in values.split(7):
        standardizer.update(piece)
    standardizer.finalize()
    expected = values.var(0, correction=0).sqrt()
    torch.testing.assert_close(standardizer.scale.double(), expected, rtol=1e-6, atol=0)


def test_vectors_are_scaled_without_a_shift():
    values = random(40, 3, 2) + 5.0
    standardizer = Standardizer("vector", 2)
    standardizer.update(values)
    standardizer.finalize()
    assert not standardizer.shift.any()
    assert not standardizer(torch.zeros(1, 3, 2)).any()
    rms = standardizer(values).square().mean((0, 1))
    torch.testing.assert_close(rms, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_constant_channels_get_the_floor(kind):
    shape = (30, 3, 5) if kind == "vector" else (30, 5)
    values = random(*shape) * torch.tensor([1.0, 2.0, 4.0, 0.0, 1e-9])
    if kind == "node":
        values[..., 3] = 100.0
    standardizer = Standardizer(kind, 5)
    standardizer.update(values)
    standardizer.finalize()
    spread = (values - (values.mean(0) if kind == "node" else 0)).reshape(-1, 5)
    spread = spread.square().mean(0).sqrt()
    torch.testing.assert_close(standardizer.scale[:3].double(), spread[:3], rtol=1e-6, atol=0)
    floor = FLOOR * spread[:3].median()
    torch.testing.assert_close(standardizer.scale[3:].double(), floor.expand(2), rtol=1e-6, atol=0)
    assert standardizer(values)[..., 3:].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["node", "vector"])
def test_all_channels_constant(kind):
    standardizer = Standardizer(kind, 2)
    standardizer.update(torch.zeros(4, 3, 2) if kind == "vector" else torch.full((4, 2), 7.0))
    standardizer.finalize()
    assert standardizer.scale.tolist() == [1.0, 1.0]


def test_statistics_that_cannot_be():
    standardizer = Standardizer("node", 3, "The thing")
    with pytest.raises(ValueError, match="The thing: no values"):
        standardizer.finalize()
    for wrong in (torch.zeros(4, 2), torch.zeros(4, 3, 3)):
        with pytest.raises(ValueError, match=r"The thing must be \(N, 3\), not"):
            standardizer.update(wrong)
    with pytest.raises(ValueError, match=r"must be \(N, 3, 3\), not \(4, 3\)"):
        Standardizer("vector", 3).update(torch.zeros(4, 3))
    term = feature_loss("n2n")
    inputs, _, teacher = feature_inputs(term)
    teacher[2, 1] = float("nan")
    term.update_statistics(inputs.teacher, inputs.batch)
    with pytest.raises(UserError, match=f"'node'.*not finite.*{WHERE} cannot be standardised"):
        term.finalize_statistics()
