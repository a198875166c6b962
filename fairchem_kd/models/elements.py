"""Which elements a model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers as _numbers
from ase.data import chemical_symbols as _symbols

from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.reading import read_json


def known_elements(path: Path, given: Iterable[str | int] | None) -> frozenset[int] | None:
    """Those that the config names, or the card beside the checkpoint; None where neither does."""
    if given is not None:
        return frozenset(as_atomic_numbers(given, "task.distillation.teacher.elements"))
    card = path.with_suffix(".json")
    if not card.is_file():
        return None
    named = _in_card(card)
    return None if named is None else frozenset(as_atomic_numbers(named, f"elements of {card}"))


def as_atomic_numbers(elements: Iterable[str | int], where: str) -> list[int]:
    """Atomic numbers of elements given as symbols or as numbers.

    Raises:
        UserError: for what is no element.
    """
    if isinstance(elements, str) or not isinstance(elements, Iterable):
        elements = str(elements).replace(",", " ").split()
    numbers = []
    for element in elements:
        text = str(element).strip()
        number = int(text) if text.isdecimal() and len(text) < 4 else _numbers.get(text, 0)
        if not 0 < number < len(_symbols):
            known = did_you_mean(text, _symbols[1:]) if 1 < len(text) < 20 else ""
            hint = known if "did you mean" in known else ""
            raise UserError(f"{where} has '{text[:60]}', which is no chemical element{hint}.")
        numbers.append(number)
    if not numbers:
        raise UserError(f"{where} is empty, so that no structure would do: name elements.")
    return numbers


def read_elements(path: Path) -> list[str] | None:
    """The elements that the card beside a checkpoint names; None without a card."""
    card = path.with_suffix(".json")
    if path.suffix in (".yml", ".yaml") or not card.is_file():
        return None
    named = _in_card(card)
    if named is None:
        return None
    return [_symbols[number] for number in as_atomic_numbers(named, f"elements of {card}")]


def _in_card(card: Path) -> Any:
    """The elements as they stand in a checkpoint's card; None where it has none."""
    try:
        return read_json(card).get("elements")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The card {card} of the checkpoint cannot be read: {error}; take another copy of it, "
            "or remove it."
        ) from error
