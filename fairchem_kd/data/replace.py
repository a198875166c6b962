"""What ``--force`` may delete: a data set of ours, and nothing beside it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fairchem_kd.data.card import CARD, FORMAT, read_card
from fairchem_kd.errors import UserError

#: What the folder of a split holds: shards, their index, and the lock files that readers leave.
_OF_A_SPLIT = re.compile(r"data\.\d+\.lmdb(-lock)?|metadata\.npz")
_SHOWN = 3


def check_replaceable(root: Path) -> None:
    """Refuse to replace what is not, as a whole, a data set that was made here.

    Raises:
        UserError: naming what else is there.
    """
    if not root.exists() and not root.is_symlink():
        return
    if root.is_symlink() or not root.is_dir():
        kind = "a link" if root.is_symlink() else "a file"
        raise UserError(
            f"--force: {root} is {kind}, not the folder of a data set, and was left as it is; "
            "name another folder."
        )
    card = read_card(root)
    if card is None or not {"format", "options", "splits"} <= card.keys():
        if not any(root.iterdir()):
            return
        raise UserError(
            f"--force: {root} has no readable {CARD}, so it is no data set that was made here, "
            f"and was left as it is (it holds {_some(sorted(root.iterdir()), root)}); remove it "
            "yourself, or name another folder."
        )
    if not isinstance(card["format"], int) or card["format"] > FORMAT:
        raise UserError(
            f"--force: {root} was made by another version (format {card['format']}), and was left "
            "as it is; remove it yourself, or name another folder."
        )
    foreign = sorted(_foreign(root))
    if foreign:
        raise UserError(
            f"--force: {root} holds more than its data set, {_some(foreign, root)}, and was left "
            "as it is; move that away, or name another folder."
        )


def put_in_place(made: Path, root: Path) -> None:
    """Have ``made`` take the place of the data set at ``root``, if there is one.

    Raises:
        UserError: what is there by now is not to be replaced.
        OSError: it cannot be.
    """
    check_replaceable(root)  # making it took a while
    if root.exists():
        shutil.rmtree(root)
    made.rename(root)


def _foreign(root: Path) -> list[Path]:
    """Everything in the folder of a data set that does not belong to it."""
    found = []
    for entry in root.iterdir():
        if entry.name == CARD and entry.is_file() and not entry.is_symlink():
            continue
        if entry.is_symlink() or not entry.is_dir():
            found.append(entry)
            continue
        inside = list(entry.iterdir())
        if not any(one.name.endswith(".lmdb") for one in inside):
            found.append(entry)  # no split, whatever it is called
            continue
        found += [
            one
            for one in inside
            if one.is_symlink() or not one.is_file() or not _OF_A_SPLIT.fullmatch(one.name)
        ]
    return found


def _some(paths: list[Path], root: Path) -> str:
    names = [repr(str(path.relative_to(root))) for path in paths[:_SHOWN]]
    more = len(paths) - _SHOWN
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
