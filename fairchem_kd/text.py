"""Text out of files, made harmless to whatever shows it; numbers as people write them."""

from __future__ import annotations


def on_one_line(text: object) -> str:
    """Without line breaks and what a terminal obeys: a name cannot look like a message of ours."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def in_lines(text: object) -> str:
    """The same of a text of several lines; the later ones are indented."""
    return "\n  ".join(on_one_line(line.replace("\t", "    ")) for line in str(text).split("\n"))


def digits(value: float, signed: str = "") -> str:
    """Three digits, and whole numbers where there are more before the point: no 1.09e+03.

    Args:
        signed: ``+`` for a sign in front of numbers above 0, too.
    """
    whole = 999.5 <= abs(value) < 1e6
    return format(value, f"{signed}{'.0f' if whole else '.3g'}")


def in_markdown(text: object, *, cell: bool = False) -> str:
    """Text in which Markdown makes no HTML and no link, and in a table's cell no other cell."""
    shown = on_one_line(text).replace("<", "&lt;").replace("](", "]\\(")
    return shown.replace("|", "\\|").replace("`", "\\`") if cell else shown
