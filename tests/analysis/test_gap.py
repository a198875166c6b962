"""The gap closed, its intervals and its verdict, against few-line references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fairchem_kd.analysis.compare.gap import (
    BETTER,
    NO_EVIDENCE,
    WORSE,
    Errors,
    Interval,
    gap_closed,
    measure_gap,
    resampled_maes,
    t_interval,
    verdict,
)
from fairchem_kd.report.tables import Table, number, percent, significant, with_spread

RNG = np.random.default_rng(1)


def errors(mean: float, systems: int = 200, seed: int = 0, noise: float = 0.1) -> Errors:
    """Absolute energy errors around ``mean`` whose hard systems are the same for every model."""
    hard = np.random.default_rng(5).normal(0, 0.3 * mean, systems)
    own = np.random.default_rng(seed).normal(0, noise * mean, systems)
    return Errors(np.abs(mean + hard + own), np.ones(systems))


def test_the_papers_formula_and_where_it_is_not_defined():
    # OC20-2M, GemNet-OC -> PaiNN, n2n, in meV: 60.8 % of the gap, for a teacher at 285.4
    assert gap_closed(440, 346, 285.4) == pytest.approx(0.608, abs=1e-3)
    assert gap_closed(104.0, 86.4, 104.0) is None
    assert gap_closed(100.0, 90.0, 120.0) is None
    assert gap_closed(100.0, 110.0, 50.0) == pytest.approx(-0.2)


def test_bootstrap_draws_whole_groups_and_the_same_ones_for_all():
    total, size = RNG.random((2, 12)) * 3, RNG.integers(1, 5, 12).astype(float)
    groups = np.repeat(["a", "b", "c", "d"], 3)
    models = [Errors(total[0], size), Errors(total[1], size), Errors(2 * total[0], size)]
    draws = resampled_maes(models, groups, resamples=300, seed=3)
    assert draws is not None
    assert draws.shape == (300, 3)
    np.testing.assert_allclose(draws[:, 2], 2 * draws[:, 0], rtol=1e-12)
    chance = np.random.default_rng(3)
    weights = chance.multinomial(4, [0.25] * 4, size=300)
    for draw, weight in zip(draws, weights, strict=True):
        per_system = np.repeat(weight, 3)
        for model in range(2):
            expected = (per_system * total[model]).sum() / (per_system * size).sum()
            assert draw[model] == pytest.approx(expected, rel=1e-12)


def test_bootstrap_in_blocks_gives_what_one_block_gives():
    many = errors(0.2, systems=8000)  # 2000 draws do not fit into one block
    first, second = (resampled_maes([many], None, 2000, seed=s) for s in (0, 1))
    assert first is not None
    assert second is not None
    assert len(first) == len(second) == 2000
    expected = many.total.std() / math.sqrt(8000)
    assert first.std() == pytest.approx(expected, rel=0.1)
    assert not np.array_equal(first, second)


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Of a difference whose true value is known, with groups that move together."""
    inside = 0
    for trial in range(200):
        chance = np.random.default_rng(trial)
        group = np.repeat(np.arange(40), 5)
        shift = chance.normal(0, 1, 40)[group] + chance.normal(0, 0.3, 200)
        student = Errors(np.full(200, 10.0), np.ones(200))
        distilled = Errors(9.5 + shift, np.ones(200))
        found = measure_gap(
            "energy_mae", [student], [distilled], groups=group, resamples=400, seed=trial
        )
        assert found.gain_over_systems is not None
        inside += found.gain_over_systems.low < 0.5 < found.gain_over_systems.high
    assert 0.88 <= inside / 200 <= 0.99


def test_one_seed_has_an_interval_over_systems_alone():
    student, distilled, teacher = errors(0.3, seed=1), errors(0.2, seed=2), errors(0.1, seed=3)
    found = measure_gap("energy_mae", [student], [distilled], teacher)
    closed = (student.mae - distilled.mae) / (student.mae - teacher.mae)
    assert found.closed == pytest.approx(closed)
    assert found.closed_over_systems is not None
    assert found.closed_over_systems.low < closed < found.closed_over_systems.high
    assert found.closed_over_seeds is None
    assert found.gain_over_seeds is None
    assert found.verdict == BETTER
    assert measure_gap("energy_mae", [distilled], [student], teacher).verdict == WORSE
    same = errors(0.3, seed=7)
    assert measure_gap("energy_mae", [student], [same], teacher).verdict == NO_EVIDENCE


def test_seeds_can_overrule_systems():
    """Each seed is clear on its own systems, but the seeds disagree."""
    students = [errors(0.30, seed=1), errors(0.30, seed=2), errors(0.30, seed=3)]
    distilled = [errors(0.20, seed=4), errors(0.36, seed=5), errors(0.27, seed=6)]
    found = measure_gap("energy_mae", students, distilled, errors(0.1), paired=True)
    assert found.gain_over_systems is not None
    assert found.gain_over_systems.low > 0
    assert found.gain_over_seeds is not None
    assert found.gain_over_seeds.low < 0 < found.gain_over_seeds.high
    assert found.verdict == NO_EVIDENCE
    assert found.seeds == (3, 3)


def test_intervals_over_seeds_are_students_t():
    first, second = np.array([3.0, 3.4, 3.1]), np.array([2.0, 2.9, 2.2])
    paired = t_interval(first, second, paired=True)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert paired == pytest.approx((expected.low, expected.high))
    welch = t_interval(first, second[:2], paired=False)
    reference = stats.ttest_ind(first, second[:2], equal_var=False).confidence_interval(0.95)
    assert welch == pytest.approx((reference.low, reference.high))
    assert t_interval(first[:1], second[:1], paired=True) is None


def test_undefined_gaps_say_why_and_still_have_a_verdict():
    student, distilled = errors(0.3, seed=1), errors(0.2, seed=2)
    worse_teacher = measure_gap("energy_mae", [student], [distilled], errors(0.4))
    assert worse_teacher.closed is None
    assert worse_teacher.closed_over_systems is None
    assert "not better" in worse_teacher.undefined
    assert worse_teacher.verdict == BETTER
    alone = measure_gap("energy_mae", [student], [distilled])
    assert alone.teacher is None
    assert alone.undefined == "no teacher"
    # a teacher that is better by less than the systems can tell has a gap, but no interval of it
    near = Errors(student.total + np.where(np.arange(200) % 2, 0.05, -0.0501), student.size)
    barely = measure_gap("energy_mae", [student], [distilled], near)
    assert barely.closed is not None
    assert barely.closed_over_systems is None


def test_one_system_has_no_interval():
    student, distilled = errors(0.3, seed=1), errors(0.2, seed=2)
    found = measure_gap("energy_mae", [student], [distilled], groups=np.zeros(200))
    assert found.gain_over_systems is None
    assert found.verdict == NO_EVIDENCE


def test_verdict_wants_every_interval_on_one_side():
    up, down, both = Interval(0.1, 0.2), Interval(-0.2, -0.1), Interval(-0.1, 0.1)
    assert verdict(up, None) == BETTER
    assert verdict(down, down) == WORSE
    assert verdict(up, both) == verdict(up, down) == verdict(None, None) == NO_EVIDENCE


def test_tables():
    table = Table("Title", ["model", "E (meV)"], notes=["A note."])
    table.add("plain", "10.0")
    table.add("a|b", "5.0")
    assert table.text().splitlines() == [
        "Title",
        "",
        "model  E (meV)",
        "-----  -------",
        "plain     10.0",
        "a|b        5.0",
        "A note.",
    ]
    assert table.markdown().splitlines()[2:] == [
        "| model | E (meV) |",
        "| --- | ---: |",
        "| plain | 10.0 |",
        "| a\\|b | 5.0 |",
        "",
        "A note.",
    ]
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.add("short")
    assert with_spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert with_spread([1.0]) == "1.0"
    assert with_spread([]) == number(None) == percent(None) == significant(None) == "-"
    assert percent(0.608, (0.5, 0.7)) == "61 % [50, 70]"
    assert [significant(v) for v in (1234.5, 85.13, 0.01234, 0.0)] == [
        "1230",
        "85.1",
        "0.0123",
        "0",
    ]
