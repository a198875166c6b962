"""What a pair of models and their data suggest: which losses, and what a step is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_kd.analysis.cka.candidates import ALIKE, best, candidates, told
from fairchem_kd.analysis.subjects.splits import count_structures
from fairchem_kd.analysis.subjects.structures import open_structures
from fairchem_kd.distillation.pairing import Choice, choose
from fairchem_kd.errors import UserError
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units

if TYPE_CHECKING:
    from torch import nn

RANKED = 64  # structures on which layers are compared
MOST_UNLABELLED = 0.875  # of the structures of a step
SURE = 10.0  # the weight of a teacher's outputs where it speaks for structures without labels


def unlabelled_block(path: Path | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of structures without labels, and the batches and epochs that go with it.

    A step has as many structures as the student's config has, and the training as many steps.

    Raises:
        UserError: it is no LMDB.
    """
    if path is None:
        return None
    if not (path.suffix == ".lmdb" or any(path.glob("*.lmdb"))):
        raise UserError(
            f"--unlabelled {path} is no LMDB, nor a folder of some; `fairchem-kd data convert "
            "SOURCE DEST` makes one of other files."
        )
    dataset = {"format": "lmdb", "src": str(path)}
    without, labelled = count_structures(dataset), count_structures(config["dataset"]["train"])
    whole = int(config["optim"].get("batch_size") or 1)
    share = min(MOST_UNLABELLED, without / max(1, without + labelled))
    batch = max(1, round(whole * (1 - share)))
    made = {"dataset": dataset, "share": round(1 - batch / whole, 4) if batch < whole else 0.5}
    optim = {"batch_size": batch}
    if batch < whole and config["optim"].get("max_epochs"):
        optim["max_epochs"] = max(1, round(int(config["optim"]["max_epochs"]) * batch / whole))
    return {**made, "optim": optim}


def propose(
    config: Mapping[str, Any],
    student: nn.Module,
    teacher: Teacher,
    path: Path,
    *,
    more: bool,
    say: Callable[[str], None],
) -> list[Choice]:
    """The teacher's outputs, and the pair of features that are most alike.

    Args:
        config: of the student's training; layers are compared on its training set.
        student: with the weights that it starts from; it is frozen.
        teacher: of which it is to learn.
        path: the student's config, for errors.
        more: there are structures without labels.
        say: takes lines for the user.

    Raises:
        UserError: the two have nothing in common.
    """
    ranked = []
    try:
        frozen = Teacher(student, Units({}, {}), {}, name=str(path))
        with open_structures(config["dataset"]["train"], limit=RANKED) as structures:
            ranked = candidates(frozen, teacher, structures)
    except UserError as error:
        say(f"note: no features are compared: {error}")
    choices, refused = [], []
    try:
        given = {"coefficient": SURE} if more else {}
        choices.append(choose("vanilla", student, teacher, given))
    except UserError as error:
        refused.append(str(error))
    if ranked:
        say("\n".join(told(ranked)))
        found = {kind: one for kind, one in best(ranked).items() if kind in ("n2n", "e2n")}
        one = max(found.values(), key=lambda c: c.similarity.value, default=None)
        if one is not None and one.similarity.value < ALIKE:
            say("note: no pair of features is alike, so that a loss on them is left out.")
        elif one is not None:
            pair = {"student": one.student, "teacher": one.teacher}
            choices.append(choose(one.kind, student, teacher, pair))
    if not choices:
        raise UserError(
            f"Nothing was found that this teacher could teach this student ({refused[0]}); name a "
            "loss with --strategy."
        )
    kinds = " and ".join(choice.kind for choice in choices)
    say(f"proposed: {kinds}")
    if not more:
        say(
            "note: on structures that have labels a teacher adds little; where there are "
            "structures without, give them with --unlabelled."
        )
    return choices
