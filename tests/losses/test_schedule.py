"""Schedules of loss coefficients against the formula written out."""

from __future__ import annotations

import math

import pytest

from fairchem_kd.losses.schedule import Schedule


def test_without_options_the_coefficient_is_constant() -> None:
    assert [Schedule().factor(step, 10) for step in (1, 5, 10, 99)] == [1.0] * 4


def test_warm_up_is_linear_from_zero() -> None:
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 10) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_starts_after_warm_up_and_ends_with_the_last_step(decay: str) -> None:
    schedule = Schedule(warmup_steps=10, decay=decay, final=0.1)
    shape = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}[decay]
    for step in range(10, 111):
        expected = 0.1 + 0.9 * shape((step - 10) / 100)
        assert schedule.factor(step, 110) == pytest.approx(expected, abs=1e-12)
    assert schedule.factor(110, 110) == pytest.approx(0.1)
    assert schedule.factor(500, 110) == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up() -> None:
    assert Schedule(warmup_steps=100, decay="cosine").factor(50, 60) == 0.5
