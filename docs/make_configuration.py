"""Writes docs/configuration.md from the typed options; a test compares the two.

Run it after an option has changed: python docs/make_configuration.py
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from fairchem_kd.distillation.balance import BalanceOptions
from fairchem_kd.distillation.companions import AdversarialOptions, RattleOptions, UnlabelledOptions
from fairchem_kd.distillation.config import (
    DistillationConfig,
    LabelLoss,
    ProjectionOptim,
    TeacherConfig,
)
from fairchem_kd.distillation.ensembles import EnsembleOptions
from fairchem_kd.distillation.gradients import DiagnosticOptions
from fairchem_kd.losses import known_losses
from fairchem_kd.losses.schedule import Schedule

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py; do not edit. -->

What fairchem-kd adds to a fairchem config stands under `task.distillation`, and under `build`
beside a dataset split's `src`. Unknown keys and values that do not fit are refused before a
model is loaded. `task.conservative: true` has forces taken from the energy, and
`task.soft_lengths: 0.1` makes the energy of a PaiNN smooth enough for dynamics ([A student that
runs dynamics](md.md)). `fairchem-kd configs --schema FILE` writes all of it, with
the stock keys that are checked, as a JSON schema for editors. Any key can be given on the command
line:
`--task.distillation.losses.e2n.coefficient=10`.
"""

BUILD = """\
## `dataset.<split>.build`

`build: {recipe: slabs, seed: 0}` (or `collisions`) makes the data set that `src` belongs to, on
first use. Sizes may be given too (`train`, `val`, `test`, and for the slabs `test_ood`); a data set
that was built with other options is refused, not overwritten.
"""


def _type(kind: object) -> str:
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) in (list, dict):
        return {list: "list", dict: "mapping"}[typing.get_origin(kind)]  # type: ignore[index]
    if args:
        return " or ".join(dict.fromkeys(map(_type, args)))
    if dataclasses.is_dataclass(kind):
        return "mapping"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]  # type: ignore[index]


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if value is field.default_factory is dataclasses.MISSING:
        return "required"
    if value is not dataclasses.MISSING:
        return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
    return "see below"


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0].replace("``", "`") + "\n"


def _text(cls: type) -> str:
    return (cls.__doc__ or "").replace("\n    ", "\n")


def _table(cls: type, skip: tuple[str, ...] = (), **defaults: float) -> str:
    """Rows of the options; ``defaults`` are those that another class has for them."""
    types = typing.get_type_hints(cls)
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        choices = field.metadata.get("choices")
        value = ", ".join(f"`{c}`" for c in choices) if choices else _type(types[field.name])
        meaning = field.metadata["help"].replace("<", "\\<")
        own = defaults.get(field.name)
        default = _default(field) if own is None else f"`{own:g}`"
        rows.append(f"| `{field.name}` | {value} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## `task.distillation`\n",
        _table(DistillationConfig),
        "## `task.distillation.teacher`\n",
        _table(TeacherConfig),
        "## `task.distillation.teacher.ensemble`\n",
        _first_line(EnsembleOptions),
        _table(EnsembleOptions),
        "## `task.distillation.labels`\n",
        _text(LabelLoss),
        _table(LabelLoss),
        "## `task.distillation.rattle`\n",
        _first_line(RattleOptions),
        _table(RattleOptions),
        "## `task.distillation.rattle.adversarial`\n",
        _first_line(AdversarialOptions),
        _table(AdversarialOptions),
        "## `task.distillation.unlabelled`\n",
        _first_line(UnlabelledOptions),
        _table(UnlabelledOptions),
        "## `task.distillation.projections`\n",
        _text(ProjectionOptim),
        _table(ProjectionOptim),
        "## `task.distillation.balance`\n",
        _first_line(BalanceOptions),
        _table(BalanceOptions),
        "Coefficients and schedules hold; a term's factor comes on top, and stands in the records "
        "as `<term>_balance`. With gradient_norm a term's coefficient is where it begins: what it "
        "settles at follows from the gradients. Uncertainty leaves the labels' loss as it is.\n",
        "## `task.distillation.diagnostics`\n",
        _first_line(DiagnosticOptions),
        _table(DiagnosticOptions),
        "Every so many steps the records have `<term>_grad_norm` and `label_loss_grad_norm`, the "
        "lengths of the gradients of each weighted term and of the labels' loss with respect to "
        "the student, and `<term>_grad_cosine`, the cosine of the two: below 0, the term pulls the "
        "student away from its labels. Such a step takes one backward more for each term and one "
        "for the labels.\n",
        "## `task.distillation.losses.<name>`\n",
        "`<name>` is yours; `kind` says which loss it is and may be left out where the name does. "
        "`<name>: {}` takes every default, `<name>: null` switches off a term of an included "
        "file.\n",
    ]
    for kind, loss in known_losses().items():
        parts += [
            f"### `kind: {kind}`\n",
            _first_line(loss),
            _table(loss.Options, coefficient=loss.default_coefficient),
        ]
    parts += ["### `schedule`\n", _text(Schedule)]
    parts += [_table(Schedule), BUILD]
    return "\n".join(part.rstrip() + "\n" for part in parts).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
