"""Similarities as tables, as plain values and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.analysis.cka.layers import FORMS, Map, Mark
from fairchem_kd.analysis.cka.similarity import Estimate
from fairchem_kd.analysis.cka.study import (
    _FORM_NAMES,
    BEFORE,
    FORMAT,
    STUDENT,
    TEACHER,
    Similarities,
)
from fairchem_kd.files import plain
from fairchem_kd.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(found: Similarities) -> list[Table]:
    """The distilled layers first, then every map."""
    made = [table for table in [marks_table(found)] if table.rows]
    for form in FORMS:
        after = found.compared.map(form, TEACHER, STUDENT)
        if after is None:
            continue
        marked = [(m.teacher, m.student) for m in found.marks if m.form == form]
        before = found.compared.map(form, TEACHER, BEFORE)
        of_form = [map_table(found, after, marked)]
        if before is not None:
            own = found.compared.map(form, BEFORE, STUDENT)
            assert own is not None
            of_form = [
                map_table(found, before, marked),
                *of_form,
                map_table(found, after - before, marked, signed=True),
                map_table(found, own, []),
            ]
        of_form[-1].notes += map_notes(found, after, bool(marked))
        made += of_form
    return made


def map_table(
    found: Similarities, shown: Map, marked: Sequence[tuple[str, str]], *, signed: bool = False
) -> Table:
    """One map; the distilled pair has an asterisk."""
    first = found.names[shown.first]
    if signed:
        title = f"CKA with {first}: {found.names[STUDENT]} minus {found.names[BEFORE]}"
    else:
        title = f"CKA of {first} (rows) and {found.names[shown.second]} (columns)"
    table = Table(f"{title}, {shown.form} form", [shown.first, *shown.columns])
    for layer, row in zip(shown.rows, shown.values, strict=True):
        cells = [
            _number(value, signed) + ("*" if (layer, column) in marked else "")
            for column, value in zip(shown.columns, row, strict=True)
        ]
        table.add(layer, *cells)
    errors = shown.errors[np.isfinite(shown.errors)]
    if len(errors):
        table.notes.append(f"Standard errors (jackknife over structures) up to {errors.max():.3f}.")
    return table


def map_notes(found: Similarities, shown: Map, marked: bool) -> list[str]:
    """What the reader of the maps of one form has to know."""
    notes = [
        f"{found.compared.atoms} atoms of {found.compared.structures} structures of {found.data}; "
        f"{_FORM_NAMES[shown.form]}. Unbiased: 1 for the same up to rotation and scale, about 0 "
        "for unrelated features."
    ]
    if marked:
        notes.append(f"* {found.meaning}.")
    return notes


def _number(value: float, signed: bool = False) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


@dataclass(frozen=True)
class Rise:
    """The similarity of the teacher's distilled layer with one layer of the student."""

    mark: Mark
    layer: str  #: the student's
    before: Estimate | None
    after: Estimate

    @property
    def difference(self) -> Estimate | None:
        return None if self.before is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """``rose``, ``fell`` or ``no evidence``, by the 95 % interval of the difference."""
        change = self.difference
        if change is None or change.half_width is None or not np.isfinite(change.value):
            return "-"
        if abs(change.value) <= change.half_width:
            return "no evidence"
        return "rose" if change.value > 0 else "fell"


def rises(found: Similarities) -> list[Rise]:
    """For every distilled pair, the student's layers from the distilled one on.

    The paper's claim (arXiv 2306.14818, section 5) is that similarity rises at the distilled layer
    and on through the student.
    """
    made = []
    for mark in found.marks:
        after = found.compared.map(mark.form, TEACHER, STUDENT)
        before = found.compared.map(mark.form, TEACHER, BEFORE)
        assert after is not None
        name = mark.student.partition("@")[0]
        start = after.columns.index(mark.student)
        for layer in after.columns[start:]:
            if layer.partition("@")[0] != name:
                continue
            earlier = None if before is None else before.at(mark.teacher, layer)
            made.append(Rise(mark, layer, earlier, after.at(mark.teacher, layer)))
    return made


def marks_table(found: Similarities) -> Table:
    """The distilled pairs, and the student's layers behind them."""
    header = ["loss" if found.distilled else "pair", "teacher's layer", "student's layer"]
    header += ["before", "after", "difference", "verdict"] if found.has_before else ["CKA"]
    kind = "distilled" if found.distilled else "marked"
    table = Table(f"CKA at the {kind} layers ({found.names[STUDENT]})", header)
    for rise in rises(found):
        layer = rise.layer + ("*" if rise.layer == rise.mark.student else "")
        cells = [rise.mark.term, rise.mark.teacher, layer]
        if rise.before is not None and rise.difference is not None:
            cells += [_with_error(rise.before), _with_error(rise.after)]
            cells += [_with_error(rise.difference, signed=True), rise.verdict]
        else:
            cells.append(_with_error(rise.after))
        table.add(*cells)
    table.notes.append(f"± standard error. * {kind}; the layers after it follow.")
    if found.has_before:
        table.notes.append(
            f"Before: {found.names[BEFORE]}. The verdict asks the 95 % interval of the difference, "
            "which knows the sampling of structures, not what another seed would give."
        )
    return table


def _with_error(estimate: Estimate, signed: bool = False) -> str:
    error = estimate.error
    text = _number(estimate.value, signed)
    return text if error is None or text == "-" else f"{text} ± {error:.3f}"


def as_dict(found: Similarities) -> dict[str, Any]:
    """Everything in the tables and more, of plain values."""

    def one(shown: Map) -> dict[str, Any]:
        return {
            "form": shown.form,
            "rows_of": shown.first,
            "columns_of": shown.second,
            "rows": shown.rows,
            "columns": shown.columns,
            "cka": _or_none(shown.values),
            "standard_error": _or_none(shown.errors),
        }

    return plain(
        {
            "format": FORMAT,
            "models": {
                role: {"name": name, "checkpoint": found.paths[role]}
                for role, name in found.names.items()
            },
            "data": found.data,
            "structures": found.compared.structures,
            "atoms": found.compared.atoms,
            "maps": [one(shown) for shown in found.compared.maps],
            "distilled": [
                {
                    "loss": rise.mark.term,
                    "form": rise.mark.form,
                    "teacher": rise.mark.teacher,
                    "student": rise.layer,
                    "is_marked": rise.layer == rise.mark.student,
                    "is_distilled": found.distilled and rise.layer == rise.mark.student,
                    "before": _estimate(rise.before),
                    "after": _estimate(rise.after),
                    "difference": _estimate(rise.difference),
                    "verdict": rise.verdict,
                }
                for rise in rises(found)
            ],
        }
    )


def _or_none(values: Any) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    value = estimate.value if np.isfinite(estimate.value) else None
    error = estimate.error
    known = error is not None and np.isfinite(error)
    return {"value": value, "standard_error": error if known else None}


def figures(found: Similarities) -> dict[str, Figure]:
    """By file name: teacher and student (before, after, difference), and student before-after."""
    from fairchem_kd.analysis.cka.plots import heat_maps

    drawn = {}
    for form in FORMS:
        after = found.compared.map(form, TEACHER, STUDENT)
        if after is None:
            continue
        marked = [(m.teacher, m.student) for m in found.marks if m.form == form]
        before = found.compared.map(form, TEACHER, BEFORE)
        shown = [after] if before is None else [before, after, after - before]
        titles = [found.names[STUDENT]]
        if before is not None:
            titles = [found.names[BEFORE], found.names[STUDENT], "difference"]
        drawn[f"cka_{form}"] = heat_maps(
            shown,
            titles,
            f"layer of {found.names[TEACHER]}",
            "student's layer",
            marked,
            found.meaning,
        )
        own = found.compared.map(form, BEFORE, STUDENT)
        if own is not None:
            drawn[f"cka_{form}_student"] = heat_maps(
                [own],
                ["student before and after"],
                f"layer of {found.names[BEFORE]}",
                f"layer of {found.names[STUDENT]}",
            )
    return drawn
