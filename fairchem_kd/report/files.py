"""The files of a report: tables as Markdown, values as JSON, figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem_kd.files import write_text
from fairchem_kd.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_tables(path: Path, tables: Sequence[Table], head: str = "") -> Path:
    """Write tables as Markdown below ``head``."""
    text = "\n\n".join([*([head] if head else []), *(table.markdown() for table in tables)])
    return write_text(path, f"{text}\n")


def write_plots(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures by name, each as PNG and SVG."""
    from fairchem_kd.report.figures import save

    return [path for name, figure in figures.items() for path in save(figure, folder / name)]
