"""A study as one HTML page that needs nothing else: no script, no network, no second file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from fairchem_kd._version import __version__
from fairchem_kd.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 3rem; color: #1a1a1a;
  background: #fff; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
a { color: #0b5394; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; }
th { vertical-align: bottom; border-bottom: 2px solid #888; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: #f6f6f6; }
.note { font-size: .82rem; color: #444; margin: .3rem 0; max-width: 60rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .82rem; color: #444; }
details { margin: .5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; }
footer { margin-top: 3rem; font-size: .8rem; color: #555; }
@media print { details { display: none; } h2 { break-after: avoid; } }
"""


@dataclass
class Section:
    """A heading, and pieces of HTML in their order."""

    title: str
    pieces: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    def html(self) -> str:
        head = f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>'
        return "\n".join([head, *self.pieces, "</section>"])

    def add_sentences(self, sentences: Sequence[str]) -> None:
        items = "".join(f"<li>{escape(one)}</li>" for one in sentences)
        self.pieces.append(f"<ul>{items}</ul>")

    def add_table(self, table: Table) -> None:
        """The table, and its notes beneath."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
        self.pieces.append(
            f'<h3>{escape(table.title)}</h3><div class="wide" tabindex="0"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}"
        )

    def add_picture(self, svg: bytes, caption: str) -> None:
        data = base64.b64encode(svg).decode()
        text = escape(caption)
        self.pieces.append(
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def add_folded(self, title: str, text: str) -> None:
        """Long text that is seen once its title is clicked."""
        self.pieces.append(
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        )


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(section.html() for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n"
        f"<footer>Made by fairchem-kd {__version__}.</footer></body></html>\n"
    )


def as_svg(figure: Figure) -> bytes:
    """A figure's SVG, the same for the same figure."""
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
