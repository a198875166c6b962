"""The card beside a checkpoint, ``NAME.json`` of ``NAME.pt``: which file it is of, by a digest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fairchem_kd.digest import sha256_of
from fairchem_kd.errors import UserError
from fairchem_kd.reading import read_json

DIGEST = "sha256"


def card_of(checkpoint: str | os.PathLike[str]) -> Path:
    """Where the card of a checkpoint is, if it has one."""
    return Path(checkpoint).with_suffix(".json")


def check_digest(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not the one that the card beside it is of.

    A card without a digest, of an earlier version say, and a file of that name that is no card
    say nothing.

    Raises:
        UserError: naming both.
    """
    card = card_of(checkpoint)
    if card == checkpoint or not card.is_file():
        return
    try:
        told = read_json(card).get(DIGEST)
    except (OSError, ValueError):
        return  # whoever needs what it says refuses it
    if told is None:
        return
    if not isinstance(told, str) or not re.fullmatch(r"[0-9a-f]{64}", told):
        raise UserError(
            f"The card {card} has a {DIGEST} that is none: copy it again, or remove that key."
        )
    found = sha256_of(checkpoint)
    if found != told:
        raise UserError(
            f"The checkpoint {checkpoint} is not the file that its card {card} is of ({DIGEST} "
            f"{found[:8]}..., and the card says {told[:8]}...): copy both again; if you changed "
            f"the file on purpose, remove {DIGEST} from the card."
        )


def is_left_over(card: Path, checkpoint: Path) -> bool:
    """Whether a card is what an export left that was killed before its file was in place."""
    if checkpoint.exists():
        return False
    try:
        told: dict[str, Any] = read_json(card)
    except (OSError, ValueError):
        return False
    return told.get("checkpoint") == checkpoint.name and DIGEST in told
