"""What the rounds have brought so far, a row for each student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fairchem_kd.report.tables import Table, number, significant


@dataclass(frozen=True)
class Row:
    """One student, and what its dynamics showed.

    ``exploration`` is what the card of its exploration tells, see
    :mod:`fairchem_kd.explore.assembling`.
    """

    name: str
    structures: int  #: that explorations had added to its training
    errors: dict[str, float] = field(default_factory=dict)  #: MAE, eV and eV/Å, by target
    exploration: dict[str, Any] = field(default_factory=dict)

    @property
    def is_content(self) -> bool:
        """Whether nothing was found that the student could still learn."""
        return not self.exploration.get("inside") and not self.exploration.get("crashes")

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "structures": self.structures,
            "errors": self.errors,
            "exploration": self.exploration,
        }


def table_of(rows: Sequence[Row], split: str, notes: Sequence[str] = ()) -> Table:
    """Errors in meV and meV/Å, of dynamics the frames inside the window and crashes."""
    table = Table(
        "Rounds",
        ["student", "added", "E MAE", "F MAE", "frames", "inside", "beyond", "crashes", "F apart"],
    )
    for row in rows:
        energy, forces = row.errors.get("energy"), row.errors.get("forces")
        told = row.exploration
        apart = told.get("difference_median")
        table.add(
            row.name,
            str(row.structures),
            number(None if energy is None else 1e3 * energy),
            number(None if forces is None else 1e3 * forces),
            str(told.get("looked_at", "-")),
            str(told.get("inside", "-")),
            str(told.get("beyond", "-")),
            str(told.get("crashes", "-")),
            significant(None if apart is None else 1e3 * apart),
        )
    where = f"of {split}" if split else "of no split: the config names none with labels"
    table.notes.append(
        f"errors in meV and meV/Å {where}; of the student's dynamics the frames that were looked "
        "at, those inside and beyond the window, crashes, and the median of the largest "
        "difference of a force from the teacher's, meV/Å"
    )
    table.notes += notes
    return table
