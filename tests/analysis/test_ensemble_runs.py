"""Runs that were distilled from several teachers, where they are compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairchem_kd.analysis.compare.runs import _teacher
from fairchem_kd.analysis.subjects.runs import ModelFile


def run(checkpoint: Any, losses: Any = None) -> ModelFile:
    losses = {"vanilla": {}} if losses is None else losses
    task = {"distillation": {"teacher": {"checkpoint": checkpoint}, "losses": losses}}
    return ModelFile(Path("run/best_checkpoint.pt"), {"task": task})


@pytest.mark.parametrize(
    ("checkpoint", "teacher", "several"),
    [
        ("a.pt", "a.pt", False),
        (["a.pt"], "a.pt", False),
        (["a.pt", "b.pt"], None, True),
        ("[a.pt, b.pt]", None, True),
    ],
)
def test_an_ensemble_is_no_teacher_to_be_measured_against(
    checkpoint: Any, teacher: str | None, several: bool
) -> None:
    file = run(checkpoint)
    assert (file.teacher, file.has_teachers) == (teacher, several)
    assert not run(checkpoint, losses={}).has_teachers


def test_a_comparison_says_why_it_gives_no_gap() -> None:
    found, note = _teacher(SimpleNamespace(teacher=None), [run(["a.pt", "b.pt"])])  # type: ignore[arg-type]
    assert found is None
    assert "distilled from an ensemble" in note
