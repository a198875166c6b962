"""Typed options: dataclasses from which validation, defaults and documentation come.

A section of a config is a dataclass whose fields are made with :func:`option`. :func:`parse` fills
one from the mapping that YAML or the command line gave, and refuses, in one sentence that names
the key, whatever does not fit. fairchem hands command-line overrides over as strings (``false``,
``null``, ``1e-4``) and YAML reads ``1e-4`` as a string, so strings are read as what they spell.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

from fairchem_kd.errors import UserError, did_you_mean

T = TypeVar("T")

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NULL = {"null", "none", "~", ""}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    choices: tuple[Any, ...] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with its default, its range or choices, and a line of documentation."""
    return dataclasses.field(
        default=default,
        default_factory=factory,
        metadata={"help": help, "choices": choices, "ge": ge, "gt": gt, "le": le},
    )


def parse(cls: type[T], given: Any, where: str) -> T:
    """Build the dataclass ``cls`` from the mapping ``given``, found in the config at ``where``.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    if is_null(given):
        given = {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be a mapping, not {_show(given)}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise UserError(f"{where} has an unknown key '{key}'{did_you_mean(str(key), fields)}.")
    types_ = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in given:
            values[name] = _value(types_[name], given[name], f"{where}.{name}", field.metadata)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is required but not given.")
    made = cls(**values)
    if hasattr(made, "check"):  # what its values have to be for each other
        made.check(where)
    return made


def read_value(kind: Any, given: Any, where: str, meta: Mapping[str, Any]) -> Any:
    """One value of a type, in a range (``ge``, ``gt``, ``le``), out of what a config gave.

    Raises:
        UserError: it is none.
    """
    return _value(kind, given, where, meta)


def is_null(given: Any) -> bool:
    """Whether a value means "nothing": None, or ``null`` from the command line."""
    return given is None or (isinstance(given, str) and given.strip().lower() in _NULL)


def _value(kind: Any, given: Any, where: str, meta: Mapping[str, Any]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if is_null(given) and type(None) in args:
            return None
        args = tuple(a for a in args if a is not type(None))
        return _first_that_fits(args, given, where, meta)
    if origin is list:
        if isinstance(given, str):  # the command line's [H, Cu]
            given = [word.strip() for word in given.strip().strip("[]").split(",") if word.strip()]
        if not isinstance(given, (list, tuple)):
            raise UserError(f"{where} must be a list, not {_show(given)}.")
        return [_value(args[0], v, f"{where}[{i}]", {}) for i, v in enumerate(given)]
    if origin is dict:
        if not isinstance(given, Mapping):
            raise UserError(f"{where} must be a mapping, not {_show(given)}.")
        return {str(k): _value(args[1], v, f"{where}.{k}", {}) for k, v in given.items()}
    if kind is Any:
        return given
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast("type[Any]", kind), given, where)
    return _checked(_scalar(kind, given, where), where, meta)


def _first_that_fits(kinds: tuple[Any, ...], given: Any, where: str, meta: Mapping) -> Any:
    is_list = isinstance(given, (list, tuple))
    refused: list[tuple[bool, UserError]] = []
    for kind in kinds:
        try:
            return _value(kind, given, where, meta)
        except UserError as error:
            refused.append(((typing.get_origin(kind) is list) == is_list, error))
    # what is wrong with it as the kind that it looks like
    raise next((error for alike, error in reversed(refused) if alike), refused[-1][1])


def _scalar(kind: type, given: Any, where: str) -> Any:
    text = given.strip().lower() if isinstance(given, str) else None
    if kind is bool:
        if isinstance(given, bool):
            return given
        if text in _TRUE | _FALSE:
            return text in _TRUE
        raise UserError(f"{where} must be true or false, not {_show(given)}.")
    if kind in (int, float):
        name = "a whole number" if kind is int else "a number"
        try:
            number = float(given if text is None else text)
        except (TypeError, ValueError):
            raise UserError(f"{where} must be {name}, not {_show(given)}.") from None
        if isinstance(given, bool) or not math.isfinite(number):
            raise UserError(f"{where} must be {name}, not {_show(given)}.")
        if kind is int and number != int(number):
            raise UserError(f"{where} must be {name}, not {_show(given)}.")
        return kind(number)
    if kind is str:
        if isinstance(given, str):
            return given
        raise UserError(f"{where} must be text, not {_show(given)}.")
    raise TypeError(f"no rule for options of type {kind}")


def _checked(value: Any, where: str, meta: Mapping[str, Any]) -> Any:
    choices = meta.get("choices")
    if choices and value not in choices:
        hint = did_you_mean(str(value), [str(c) for c in choices])
        raise UserError(f"{where} cannot be {_show(value)}{hint}.")
    for bound, holds, words in (
        ("ge", lambda b: value >= b, "at least"),
        ("gt", lambda b: value > b, "greater than"),
        ("le", lambda b: value <= b, "at most"),
    ):
        limit = meta.get(bound)
        if limit is not None and not holds(limit):
            raise UserError(f"{where} must be {words} {limit:g}, not {_show(value)}.")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
