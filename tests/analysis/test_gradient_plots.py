"""Gradients of terms beside the labels', out of the records of runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fairchem_kd.analysis.compare.comparison import TEACHER
from fairchem_kd.analysis.compare.gradients import gradient_curves, plot_gradients


def group(label: str, *runs: list[dict[str, Any]], role: str = "student") -> Any:
    def records(of: list[dict[str, Any]]) -> Any:
        return lambda kind: of if kind == "train" else []

    files = [SimpleNamespace(records=records(run)) for run in runs]
    return SimpleNamespace(label=label, role=role, files=files)


def line(step: int, cosine: Any, norm: Any, labels: Any = 2.0) -> dict[str, Any]:
    metrics = {"n2n_grad_cosine": cosine, "n2n_grad_norm": norm, "label_loss_grad_norm": labels,
               "n2n": 1.0, "loss": 3.0}  # fmt: skip
    return {"step": step, "metrics": metrics}


def comparison(*groups: Any) -> Any:
    return SimpleNamespace(groups=list(groups))


def test_points_are_those_of_the_first_seed_with_such_records() -> None:
    noted = [line(1, 0.5, 4.0), line(2, 0.5, 4.0), line(3, -0.25, 1.0), {"step": 4, "metrics": {}}]
    strange = [{"step": 5}, line(6, None, 1.0), line(7, 0.1, float("nan")), line(8, 0.1, 1.0, 0.0)]
    found = gradient_curves(
        comparison(group("teacher", noted, role=TEACHER), group("plain", [], []),
                   group("kd", [{"step": 1, "metrics": {"loss": 1.0}}], noted + strange, noted))
    )  # fmt: skip
    assert found == {"kd": {"n2n": [(1, 0.5, 2.0), (3, -0.25, 0.5)]}}


def test_what_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert plot_gradients(comparison(group("plain", []))) is None
    figure = plot_gradients(
        comparison(group("a", [line(1, 0.5, 4.0), line(2, 0.4, 0.0)]), group("b", [line(1, -1, 2)]))
    )
    assert figure is not None
    above = figure.axes[0]
    assert above.get_title() == "a"
    assert list(above.lines[0].get_ydata()) == [0.5, 0.4]
    assert above.lines[0].get_label() == "n2n"
