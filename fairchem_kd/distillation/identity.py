"""What the saved state of a distillation belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fairchem_kd.errors import UserError
from fairchem_kd.losses import Loss

#: Options of a term that may change on resume; projections and statistics were made for the others.
_CHANGEABLE = ("coefficient", "schedule", "fn", "delta")
#: What a run's identity was before a key of it was there.
_BEFORE = {"teacher.energy_zero": "teacher"}


def identity_of(
    terms: Mapping[str, Loss], *, teacher: str, samples: int, zero: str
) -> dict[str, Any]:
    """The teacher, the statistics' samples and the terms, as far as a state was made for them.

    Coefficients, schedules and loss functions may change on resume; what projections and
    statistics were made for may not.

    Args:
        terms: by name.
        teacher: its identity.
        samples: from which features are standardised.
        zero: whose zero energies have.
    """
    losses = {}
    for name, term in terms.items():
        options = dataclasses.asdict(term.options)
        losses[name] = {"kind": term.kind} | {
            key: value for key, value in options.items() if key not in _CHANGEABLE
        }
    return {
        "teacher": teacher,
        "statistics_samples": samples,
        "losses": losses,
        "teacher.energy_zero": zero,
    }


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of a training with another teacher, or with other terms.

    Raises:
        UserError: it is one, naming the key.
    """
    for key, value in own.items():
        if _given(saved.get(key, _BEFORE.get(key))) != _given(value):
            raise UserError(
                f"task.distillation.{key}: this run was started with another one, so it cannot "
                "be resumed: give the same as then, or start a new run."
            )


def _given(identity: Any) -> Any:
    """Without what is null: an option that was not there when a run began is null now."""
    if not isinstance(identity, dict):
        return identity
    return {key: _given(value) for key, value in identity.items() if value is not None}
