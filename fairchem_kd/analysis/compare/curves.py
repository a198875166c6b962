"""Learning curves of runs, from their records."""

from __future__ import annotations

from typing import Any

from fairchem_kd.analysis.compare.comparison import TEACHER, Comparison


def learning_curves(comparison: Comparison) -> dict[str, list[list[dict[str, Any]]]]:
    """By label, for every seed, the validations in its run's records: step, seconds, metrics."""
    curves = {}
    for group in comparison.groups:
        if group.role == TEACHER:
            continue
        found = [
            [
                {"step": r["step"], "seconds": r["seconds"], "metrics": r["metrics"]}
                for r in file.records("val")
            ]
            for file in group.files
        ]
        if any(found):
            curves[group.label] = found
    return curves
