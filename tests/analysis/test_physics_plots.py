"""Plots of models as potentials: how far energies go, and where relaxations end."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fairchem_kd.analysis.physics.dynamics import Dynamics
from fairchem_kd.analysis.physics.measure import Relaxation
from fairchem_kd.analysis.physics.plots import (
    WINDOW,
    figures,
    gone_from_start,
    plot_drift,
    plot_relaxations,
    plot_summary,
)
from fairchem_kd.analysis.physics.study import Physics, Settings
from fairchem_kd.analysis.physics.summary import Findings

pytest.importorskip("matplotlib")
STEP = 20.0  # fs: five steps a window


def run(drift: float, steps: int = 100, wave: float = 0.0) -> Dynamics:
    """Of a total energy that drifts (eV/atom/ps), and comes and goes once a window."""
    times = STEP / 1000 * np.arange(steps + 1)
    energy = drift * times + wave * np.sin(2 * np.pi * times / WINDOW)
    return Dynamics((energy - energy[0]).tolist(), STEP, 100, steps == 100, "")


def of(drifts: list[float], ends: list[float | None]) -> Findings:
    found = Findings(dynamics=[run(one, wave=1e-3) for one in drifts])
    found.relaxations = [Relaxation(number != 0, 5, end) for number, end in enumerate(ends)]
    found.scans = [None] * len(drifts)
    return found


@pytest.fixture
def found() -> Physics:
    models = {
        "direct": [of([2e-2, -3e-2], [0.3, 0.02]), of([1e-2, 1e-2], [0.1, None])],
        "conservative": [of([1e-5, 2e-5], [-0.004, 0.001])],
    }
    return Physics(None, "test", 2, Settings(md_steps=100, time_step=STEP), models)


def test_what_comes_and_goes_is_averaged_away() -> None:
    runs = [run(0.02, wave=0.5), run(-0.01), run(0.04, steps=30)]
    times, gone = gone_from_start(runs)
    for row, one in zip(gone, runs, strict=True):
        for time, value in zip(times, row, strict=True):
            first = round(time / (STEP / 1000) - 2)  # of a window of five steps
            if first + 5 > len(one.energy):
                assert np.isnan(value)
                continue
            expected = sum(one.energy[first : first + 5]) / 5 - sum(one.energy[:5]) / 5
            assert value == pytest.approx(abs(expected), abs=1e-12)
    np.testing.assert_allclose(gone[0], 0.02 * (times - times[0] + 0.1), rtol=1e-6)
    assert times[0] == pytest.approx(0.14)  # the first window that shares no step with the first
    assert times[-1] == pytest.approx(1.96)


def test_runs_that_end_at_once_are_left_out(found: Physics) -> None:
    assert gone_from_start([])[0].size == 0
    assert gone_from_start([run(0.1, steps=1)])[0].size == 0
    found.models["broken"] = [Findings(dynamics=[run(0.1, steps=0)])]
    assert len(plot_drift(found).axes[0].lines) == 2


def test_the_median_of_runs_and_seeds_is_drawn_by_decades(found: Physics) -> None:
    (axes,) = plot_drift(found).axes
    assert axes.get_yscale() == "log"
    direct, conservative = axes.lines
    runs = [one for seed in found.models["direct"] for one in seed.dynamics]
    np.testing.assert_allclose(
        direct.get_ydata(), 1000 * np.median(gone_from_start(runs)[1], axis=0)
    )
    assert np.median(direct.get_ydata()) > 100 * np.median(conservative.get_ydata())


def test_every_end_is_there_and_says_whether_it_converged(found: Physics) -> None:
    (axes,) = plot_relaxations(found).axes
    marks = [(round(float(one.get_ydata()[0])), float(one.get_xdata()[0])) for one in axes.lines]
    assert marks == [(0, 300.0), (0, 20.0), (0, 100.0), (1, -4.0), (1, 1.0)]
    hollow = [one.get_markerfacecolor() == "none" for one in axes.lines]
    assert hollow == [True, False, True, True, False]


def test_drifts_of_different_orders_are_all_to_be_seen(found: Physics) -> None:
    axes = next(a for a in plot_summary(found).axes if "drift" in a.get_xlabel())
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 0.015  # meV/atom/ps, of the one
    assert high > 15  # of the other
    found.models["still"] = [of([0.0, 0.0], [None, None])]  # has no logarithm
    for one in found.models["still"][0].dynamics:
        one.energy[:] = [0.0] * len(one.energy)
    axes = next(a for a in plot_summary(found).axes if "drift" in a.get_xlabel())
    assert axes.get_xscale() == "linear"


def test_without_any_runs_there_are_figures(found: Physics) -> None:
    empty = Physics(None, "test", 0, Settings(), {"one": [Findings()]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an axis without values
        assert len(plot_drift(empty).axes[0].lines) == 0
        assert len(plot_relaxations(empty).axes[0].lines) == 0
    assert {"physics_drift", "physics_relaxations"} <= set(figures(found))
