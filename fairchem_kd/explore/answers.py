"""What a calculator said of the frames of an exploration, for its store: nobody is asked twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fairchem_kd.calculators.asking import shown
from fairchem_kd.explore.group_file import read_group
from fairchem_kd.explore.potentials import structure_of
from fairchem_kd.explore.rattling import placed
from fairchem_kd.explore.settings import Found
from fairchem_kd.explore.starts import Start
from fairchem_kd.store.format import Array, Structure


class Answers:
    """Finds an answer again by what the calculator was shown of the structure.

    They are left in the files of the groups until they are looked up, one file at a time.

    Args:
        files: of the groups, see :mod:`fairchem_kd.explore.group_file`.
        groups: their structures to begin with.

    Raises:
        OSError, ValueError: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path], groups: Sequence[Sequence[Start]]) -> None:
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._held: tuple[Path | None, list[Found]] = (None, [])
        for file, group in zip(files, groups, strict=True):
            for row, one in enumerate(read_group(file).found):
                if one.answer is not None and one.answer.kept is not None:
                    structure = structure_of(placed(group[one.start], one.pos))
                    self._places[shown(structure)] = (file, row)

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, structure: Structure) -> Mapping[str, Array] | None:
        """All that a store keeps of the answer, by column; None where there is none."""
        place = self._places.get(shown(structure))
        if place is None:
            return None
        file, row = place
        if self._held[0] != file:
            self._held = (file, read_group(file).found)
        answer = self._held[1][row].answer
        return None if answer is None else answer.kept
