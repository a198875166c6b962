"""Text out of files, made harmless to whatever shows it."""

from __future__ import annotations


def on_one_line(text: object) -> str:
    """Without line breaks and what a terminal obeys: a name cannot look like a message of ours."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def in_lines(text: object) -> str:
    """The same of a text of several lines; the later ones are indented."""
    return "\n  ".join(on_one_line(line.replace("\t", "    ")) for line in str(text).split("\n"))


def in_markdown(text: object, *, cell: bool = False) -> str:
    """Text in which Markdown makes no HTML and no link, and in a table's cell no other cell."""
    shown = on_one_line(text).replace("<", "&lt;").replace("](", "]\\(")
    return shown.replace("|", "\\|").replace("`", "\\`") if cell else shown
