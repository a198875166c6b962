"""How figures look, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.errors import UserError
from fairchem_kd.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Okabe and Ito (2008), without the yellow that is too light for lines on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


LINES = ("-", "--", "-.", ":")

_FEWEST_TICKS = 3  # with a number, that a logarithmic axis should have


_INSTALL = "pip install 'fairchem-kd[plots]' (or: pip install matplotlib)"


def check_matplotlib() -> None:
    """Make sure that plots can be drawn, before long work is done for them.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Plots need matplotlib, which is not installed ({error}): {_INSTALL}, or leave them "
            "out with --no-plots."
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; drawn without a display."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text in SVG, and the same figure gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fairchem-kd"})
    return Figure(figsize=(width, height), layout="constrained")


def style(number: int) -> dict[str, Any]:
    """Colour, marker and line style of the model at this place."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with the endings .png and .svg."""
    formats: dict[str, dict[str, Any]] = {
        "png": {"dpi": 200},
        "svg": {"metadata": {"Date": None}},
    }
    return [
        write_whole(
            path.with_suffix(f".{ending}"),
            lambda file, ending=ending, options=options: figure.savefig(  # type: ignore[misc]
                file, format=ending, **options
            ),
        )
        for ending, options in formats.items()
    ]


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with :func:`plain_numbers`."""
    axes.set(**{f"{which}scale": "log"})
    plain_numbers(axes.xaxis if which == "x" else axes.yaxis)


def plain_numbers(axis: Axis) -> None:
    """Of a logarithmic axis: 1, 2, 5 times powers of ten; on a short one others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    class Plain(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            ticks = np.asarray(super().tick_values(vmin, vmax))
            if ((ticks >= vmin) & (ticks <= vmax)).sum() >= _FEWEST_TICKS:
                return ticks
            return MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(vmin, vmax)

    axis.set_major_locator(Plain(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes) -> None:
    """What the lines of ``axes`` are, below them; nothing where there are none."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    rows = -(-len(labels) // 4)
    columns = -(-len(labels) // rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
