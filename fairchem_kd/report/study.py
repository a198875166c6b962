"""What an analysis found, ready to be printed, written into a folder, or put on a page.

    files, options -> study -> Study -> tables, figures, as_dict

Every analysis gives one; the commands print it, ``report`` embeds it, and nothing has to read text
that another part wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairchem_kd.errors import UserError
from fairchem_kd.files import write_json, write_whole
from fairchem_kd.reading import Unreadable, read_json
from fairchem_kd.report.files import write_plots, write_tables
from fairchem_kd.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The key under which a file of values keeps the tables too, for a page that is made later.
TABLES = "tables"


@dataclass(frozen=True)
class Study:
    """Tables, figures and values of one analysis.

    Attributes:
        name: of the analysis; its files are called so.
        tables: makes what is shown.
        figures: draws the plots, by file name (needs matplotlib).
        as_dict: gives everything as plain values.
        sentences: what the tables say, in words.
        head: Markdown above the tables.
        table_file: another name for the file of tables.
        values_file: another name for the file of values.
        arrays: gives what is too large for text, as arrays by name.
        arrays_file: where they go.
    """

    name: str
    tables: Callable[[], list[Table]]
    figures: Callable[[], dict[str, Figure]]
    as_dict: Callable[[], dict[str, Any]]
    sentences: Sequence[str] = ()
    head: str = ""
    table_file: str = ""
    values_file: str = ""
    arrays: Callable[[], dict[str, np.ndarray]] | None = None
    arrays_file: str = "arrays.npz"

    def text(self) -> str:
        """For a terminal: the tables, a blank line between them, then the sentences."""
        shown = "\n\n".join(table.text() for table in self.tables())
        return "\n".join([shown, *(["", *self.sentences] if self.sentences else [])])

    def values(self) -> dict[str, Any]:
        """Everything as plain values, with the tables as they are shown."""
        return {**self.as_dict(), TABLES: [table.as_dict() for table in self.tables()]}

    def write(self, folder: Path, *, with_plots: bool = True) -> list[Path]:
        """Write tables, values, arrays and, if asked for, the plots into ``folder``.

        Args:
            folder: made where it does not exist; files of these names are overwritten.
            with_plots: draw them.

        Returns:
            The files.

        Raises:
            UserError: plots are asked for and matplotlib is missing.
        """
        tables = folder / (self.table_file or f"{self.name}.md")
        values = folder / (self.values_file or f"{self.name}.json")
        written = [
            write_tables(tables, self.tables(), self.head),
            write_json(values, self.values()),
        ]
        if self.arrays is not None:
            arrays = self.arrays()
            written.append(
                write_whole(
                    folder / self.arrays_file, lambda file: np.savez_compressed(file, **arrays)
                )
            )
        if with_plots:
            written += write_plots(folder, self.figures())
        return written


def read_tables(folder: Path, name: str) -> list[Table]:
    """The tables of the study that :meth:`Study.write` put into a folder.

    Raises:
        UserError: there is none, or it is not what this version writes.
    """
    file = folder / f"{name}.json"
    again = f"name a folder that `fairchem-kd {name} --out` wrote"
    try:
        values = read_json(file)
    except OSError as error:
        raise UserError(
            f"--{name} {folder}: there is no {file.name} in it ({error.strerror}); {again}."
        ) from error
    except Unreadable as error:
        raise UserError(f"{file} cannot be read ({error}); {again}.") from error
    try:
        return [Table.from_dict(one) for one in values[TABLES]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} holds no tables that this version can show ({error!r}); {again}, or run that "
            "again."
        ) from error
