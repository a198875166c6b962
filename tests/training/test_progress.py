"""The lines that tell how far a training is."""

from __future__ import annotations

import logging

import pytest

from fairchem_kd.training import progress
from fairchem_kd.training.progress import Progress, in_words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (99, "99 s"), (720, "12 min"), (8280, "2.3 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_lines_come_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """The first after ten steps, then every half minute, as long as the training is short."""
    told = Progress(100, 2600)
    with caplog.at_level(logging.INFO):
        for step in range(101, 2601):
            clock[0] += 0.125
            told.advance(step)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [
        "step 110/2600, 4.2%, 125 ms a step, 5 min left",
        "step 350/2600, 13.5%, 5 min left",
    ]
    assert len(lines) == 11  # 10, 250, ..., 2410 steps of this process
    assert lines[-1] == "step 2510/2600, 96.5%, 11 s left"


def test_a_long_training_says_it_fifty_times(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    told = Progress(0, 10000)
    with caplog.at_level(logging.INFO):
        for step in range(1, 10001):
            clock[0] += 10.0
            told.advance(step)
    assert len(caplog.records) == 50


def test_other_ranks_say_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    told = Progress(0, 100, shown=False)
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            clock[0] += 100.0
            told.advance(step)
    told.close()
    assert not caplog.records
