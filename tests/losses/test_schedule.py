"""Schedules of loss coefficients against the formula written out."""

from __future__ import annotations

import math

import pytest

from fairchem_kd.errors import UserError
from fairchem_kd.losses.schedule import Schedule
from fairchem_kd.schema import parse


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


@pytest.mark.parametrize(
    ("start", "stop", "first", "last"),
    [(0, None, 1, 40), (0.25, None, 11, 40), (0, 0.5, 1, 20), (0.25, 30, 11, 30), (5, 6, 6, 6)],
)
def test_start_and_stop(start: float, stop: float | None, first: int, last: int) -> None:
    """Shares of the training, or steps: all of it, a quarter is left out, half of it, ..."""
    schedule = Schedule(start=start, stop=stop)
    counts = [step for step in range(1, 41) if schedule.factor(step, 40) == 1.0]
    assert counts == list(range(first, last + 1))
    assert counts == [step for step in range(1, 41) if schedule.runs(step, 40)]


def test_warm_up_and_decay_are_between_start_and_stop() -> None:
    moved = Schedule(start=10, stop=60, warmup_steps=5, decay="cosine", final=0.2)
    whole = Schedule(warmup_steps=5, decay="cosine", final=0.2)
    found = [moved.factor(10 + step, 100) for step in range(1, 51)]
    assert found == [whole.factor(step, 50) for step in range(1, 51)]
    assert [moved.factor(step, 100) for step in (1, 10, 61, 100)] == [0.0] * 4


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.5, 0.2), (30, 20)])
def test_a_schedule_that_ends_before_it_begins_is_refused(start: float, stop: float) -> None:
    with pytest.raises(UserError, match=r"e2n\.schedule\.stop .* must come after"):
        parse(Schedule, {"start": start, "stop": stop}, "e2n.schedule")
