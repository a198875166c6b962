"""Heat maps of the similarity of layers, as for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fairchem_kd.analysis.cka.layers import Map
from fairchem_kd.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: cividis grows lighter steadily and looks alike to all; the numbers in the cells say the sign.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"


def heat_maps(
    maps: Sequence[Map],
    titles: Sequence[str],
    row_label: str,
    column_label: str,
    marked: Sequence[tuple[str, str]] = (),
    meaning: str = "",
) -> Figure:
    """Maps of the same layers side by side; a third one is the difference of the first two.

    Args:
        maps: one, or three: before, after and their difference.
        titles: of the panels.
        row_label: what the rows are.
        column_label: what the columns are.
        marked: (row, column) of pairs that get a frame.
        meaning: of the frame.
    """
    rows, columns = maps[0].values.shape
    width = max(2.4, 0.52 * columns)
    figure = new_figure(1.9 + (width + 0.9) * len(maps), 1.6 + max(1.6, 0.34 * rows))
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for number, (axes, shown, title) in enumerate(zip(panels, maps, titles, strict=True)):
        is_difference = number == 2
        values = shown.values
        known = np.abs(values[np.isfinite(values)])
        limit = max(float(known.max()) if len(known) else 0.0, 0.05)
        image = axes.imshow(
            values,
            cmap=DIVERGING if is_difference else SEQUENTIAL,
            vmin=-limit if is_difference else 0.0,
            vmax=limit if is_difference else 1.0,
            aspect="auto",
        )
        _write_numbers(axes, values, image, signed=is_difference)
        for row, column in marked:
            _frame(axes, shown.rows.index(row), shown.columns.index(column))
        axes.set_xticks(range(columns), shown.columns, rotation=45, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(column_label, fontsize=9)
        name = "change of CKA" if is_difference else "linear CKA (unbiased)"
        bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
        bar.set_label(name, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    panels[0].set_yticks(range(rows), maps[0].rows, fontsize=8)
    panels[0].set_ylabel(row_label, fontsize=9)
    if marked:
        figure.supxlabel(f"framed: {meaning}", fontsize=8)
    return figure


def _write_numbers(axes: Axes, values: np.ndarray, image: object, *, signed: bool) -> None:
    """The value in each cell, black or white after the cell's lightness."""
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if not np.isfinite(value):
            axes.text(column, row, "-", ha="center", va="center", fontsize=7)
            continue
        red, green, blue, _ = image.cmap(image.norm(value))  # type: ignore[attr-defined]
        light = 0.299 * red + 0.587 * green + 0.114 * blue
        axes.text(
            column,
            row,
            f"{value:+.2f}" if signed else f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if light > 0.5 else "white",
        )


def _frame(axes: Axes, row: int, column: int) -> None:
    """A white frame inside a black one: seen on every colour."""
    from matplotlib.patches import Rectangle

    for colour, line in (("black", 3.5), ("white", 1.5)):
        corner = (column - 0.46, row - 0.46)
        axes.add_patch(
            Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=line, zorder=3)
        )
