"""The losses of labels as fairchem's trainers make them out of ``loss_functions``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fairchem.core.modules.loss import DDPLoss

from fairchem_kd.errors import UserError

#: What stock's own default configs of energies and forces have.
DEFAULT: tuple[dict[str, dict[str, Any]], ...] = (
    {"energy": {"fn": "mae", "coefficient": 1.0}},
    {"forces": {"fn": "l2mae", "coefficient": 100.0}},
)


def label_losses(given: Any, where: str = "loss_functions") -> list[tuple[str, dict[str, Any]]]:
    """``(target, {"fn", "coefficient"})`` of each, of the form that a config has.

    Args:
        given: a list of ``{target: {"fn": name, "coefficient": number}}``.
        where: what errors call it.

    Raises:
        UserError: it has another form, or names a function that fairchem does not have.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise UserError(
            f"{where} is a list of mappings such as {{'energy': {{'fn': 'mae', 'coefficient': 1}}}}"
            f", not {type(given).__name__}."
        )
    made: list[tuple[str, dict[str, Any]]] = []
    for number, entry in enumerate(given):
        here = f"{where}[{number}]"
        if not isinstance(entry, Mapping):
            raise UserError(f"{here} is {type(entry).__name__}, and not a target with its loss.")
        for target, options in entry.items():
            made.append((str(target), _one(options, f"{here}.{target}")))
    return made


def _one(options: Any, where: str) -> dict[str, Any]:
    if not isinstance(options, Mapping) or not {"fn", "coefficient"} <= set(options):
        raise UserError(f"{where} needs a function, fn, and a coefficient.")
    coefficient = options["coefficient"]
    number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    if not number or not 0 <= coefficient < float("inf"):
        raise UserError(
            f"{where}.coefficient is {coefficient!r:.40}, and not a number of 0 or more."
        )
    try:
        loss = DDPLoss(options["fn"], reduction=options.get("reduction", "mean"))
    except (RuntimeError, KeyError, AssertionError, ImportError, ValueError, TypeError) as error:
        raise UserError(f"{where}: fairchem has no such loss: {error}") from error
    return {"fn": loss, "coefficient": float(coefficient)}
