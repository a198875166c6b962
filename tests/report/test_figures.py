"""How figures look: the numbers on a logarithmic axis."""

from __future__ import annotations

import pytest

from fairchem_kd.report.figures import logarithmic, new_figure


@pytest.mark.parametrize(
    ("low", "high", "some"),
    [(20.0, 300.0, {"50", "100", "200"}), (950.0, 1460.0, {"1000", "1200", "1400"})],
)
def test_a_logarithmic_axis_has_numbers_however_short(
    low: float, high: float, some: set[str]
) -> None:
    pytest.importorskip("matplotlib")
    axes = new_figure(4.0, 3.0).subplots()
    axes.plot([low, high], [low, high])
    logarithmic(axes, "x")
    limits = axes.get_xlim()
    told = {text.get_text() for text in axes.get_xticklabels() if text}
    ticks = [tick for tick in axes.get_xticks() if limits[0] <= tick <= limits[1]]
    assert some <= told
    assert 3 <= len(ticks) <= 8
