"""Tables of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairchem_kd.text import in_lines, in_markdown, on_one_line


@dataclass
class Table:
    """A title, a header, rows of cells, and notes beneath; the first column is aligned left."""

    title: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row; it must have as many cells as the header."""
        if len(cells) != len(self.header):
            raise ValueError(f"{len(cells)} cells for {len(self.header)} columns")
        self.rows.append([on_one_line(cell) for cell in cells])

    def text(self) -> str:
        """For a terminal: columns aligned with spaces, a rule under the header."""
        columns = list(zip(self.header, *self.rows, strict=True))
        widths = [max(len(cell) for cell in column) for column in columns]

        def line(cells: Sequence[str]) -> str:
            first = cells[0].ljust(widths[0])
            rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            return "  ".join([first, *rest]).rstrip()

        rule = "  ".join("-" * width for width in widths)
        parts = [self.title, "", line(self.header), rule, *(line(row) for row in self.rows)]
        return "\n".join(in_lines(part) for part in [*parts, *self.notes])

    def markdown(self) -> str:
        """For a README: a heading, a pipe table, the notes as a paragraph."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(in_markdown(cell, cell=True) for cell in cells) + " |"

        rule = ["---", *["---:"] * (len(self.header) - 1)]
        parts = [f"### {in_markdown(self.title)}", "", line(self.header), line(rule)]
        parts += [line(row) for row in self.rows]
        if self.notes:
            parts += ["", *(in_markdown(note) for note in self.notes)]
        return "\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Of plain values, for JSON."""
        return {
            "title": self.title,
            "header": list(self.header),
            "rows": self.rows,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Table:
        """The table that :meth:`as_dict` gave.

        Raises:
            KeyError: something is missing.
            ValueError: something is not text, or a row has not the header's cells.
        """
        made = cls(_text(values["title"]), _texts(values["header"]))
        for row in _list(values["rows"]):
            made.add(*_texts(row))
        made.notes += _texts(values["notes"])
        return made


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.40} is not a list")
    return value


def _texts(value: Any) -> list[str]:
    return [_text(one) for one in _list(value)]


def number(value: float | None, digits: int = 1) -> str:
    """A value, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± standard deviation`` of seeds; one value alone has no spread."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return number(mean, digits)
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    """``61 % [52, 70]``, or a dash."""
    if share is None:
        return "-"
    text = f"{100 * share:.0f} %"
    if interval is None:
        return text
    return f"{text} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def significant(value: float | None, digits: int = 3) -> str:
    """A value to so many significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    from math import floor, log10

    places = digits - 1 - floor(log10(abs(value)))
    return f"{round(value, places):.{max(0, places)}f}"
