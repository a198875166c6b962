"""Warnings of terms that teach nothing, and of those that drown the labels."""

from __future__ import annotations

import logging

import pytest

from fairchem_kd.distillation.watch import Watch


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_feature_that_stays_unknown_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(["n2n", "e2n"], 100)
    for step in range(5, 60, 5):
        watch.look(step, {"n2n": 0.97, "e2n": 1.0 - step / 20, "vanilla": 5.0}, 1.0)
    (said,) = warnings_of(caplog)
    assert said.startswith("n2n is still 0.97 at step 15 of 100")


def test_a_term_that_begins_late_has_its_time(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(["n2n"], 100)
    for step in (50, 55, 59):
        watch.look(step, {"n2n": 1.0}, 1.0)
    assert not warnings_of(caplog)
    watch.look(60, {"n2n": 1.0}, 1.0)
    assert len(warnings_of(caplog)) == 1


def test_a_heavy_term_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch([], 1000)
    for step in range(1, 8):
        watch.look(step, {"e2n": 0.5, "e2n_weighted": 4.0, "n2n_weighted": 2.9}, 1.0)
    (said,) = warnings_of(caplog)
    assert said.startswith("e2n counts 4.0 times the labels' loss at step 3")


def test_a_weight_that_was_asked_for_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch([], 1000, asked=["vanilla"])
    for step in range(1, 8):
        watch.look(step, {"vanilla.energy_weighted": 40.0, "e2n_weighted": 4.0}, 1.0)
    (said,) = warnings_of(caplog)
    assert said.startswith("e2n counts")


def test_a_validation_that_distillation_makes_worse(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch([], 1000)

    def look(step: int, energy: float, forces: float, *, distilling: bool) -> None:
        metrics = {"energy_mae": energy, "forces_mae": forces, "loss": 3.0 * step}
        watch.validated(
            step, metrics, distilling=distilling, names=["energy_mae", "forces_mae", "stress_mae"]
        )

    look(100, 0.9, 0.5, distilling=False)
    look(200, 0.6, 0.3, distilling=False)
    look(300, 0.7, 0.4, distilling=False)
    look(400, 0.8, 0.2, distilling=True)  # it has just begun
    assert not warnings_of(caplog)
    look(500, 0.65, 0.2, distilling=True)
    look(600, 0.65, 0.2, distilling=True)
    (said,) = warnings_of(caplog)
    assert said.startswith("energy_mae is 0.65 at step 500, and was 0.6 with the labels alone")


def test_a_training_that_distils_from_its_start_has_nothing_to_compare_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = Watch([], 100)
    for step, value in ((10, 0.1), (50, 0.2), (90, 0.3)):
        watch.validated(step, {"energy_mae": value}, distilling=step < 60, names=["energy_mae"])
    assert not warnings_of(caplog)


def test_no_word_where_labels_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch([], 1000)
    for step in range(1, 8):
        watch.look(step, {"e2n_weighted": 4.0}, 0.0)
    assert not warnings_of(caplog)


def test_one_bad_reading_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch([], 1000)
    for step, value in enumerate((1.0, 8.0, 1.0, 0.5, 0.5), 1):
        watch.look(step, {"e2n_weighted": value}, 1.5)
    assert not warnings_of(caplog)
