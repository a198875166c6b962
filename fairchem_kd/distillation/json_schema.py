"""The JSON schema of a whole config, for editors that complete and check YAML by one.

Made of what the configs are read by: the typed options of ``task.distillation`` with every
registered loss, and the tables of the stock keys that are checked. It takes what a run takes; what
needs the models or the data set to be known is said by the run alone.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Union

from fairchem_kd.distillation.config import DistillationConfig
from fairchem_kd.losses import known_losses
from fairchem_kd.stock.option_table import BLOCKS, DATASET, OPTIM, Option

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: A number as text: YAML 1.1 reads 1e-4 so, and both readers of ours take it for the number.
_NUMBER_AS_TEXT = {"type": "string", "pattern": r"^\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*$"}
_SPLITS = ("train", "val", "test", "relax")


def config_schema() -> dict[str, Any]:
    """The schema, of plain values."""
    losses = {name: _class(cls.Options, {"kind"}) for name, cls in sorted(known_losses().items())}
    dataset = _table(DATASET)
    task = {
        "type": ["object", "null"],
        "properties": {
            "distillation": {"anyOf": [_distillation(), {"type": "null"}]},
            "conservative": {"type": ["boolean", "null"]},
            "soft_lengths": {"type": ["number", "null"], "minimum": 1e-3, "maximum": 1},
        },
    }
    blocks: dict[str, Any] = dict.fromkeys(BLOCKS, True)
    blocks |= {
        "task": task,
        "optim": _table(OPTIM),
        "dataset": {
            "anyOf": [
                {"type": "object", "properties": dict.fromkeys(_SPLITS, _or_null(dataset))},
                {"type": ["array", "null"]},  # OCP's
            ]
        },
        "includes": {"type": "array", "items": {"type": "string"}},
        "outputs": {"type": ["object", "null"]},
        "loss_functions": {"type": ["array", "null"], "items": {"type": "object"}},
        "evaluation_metrics": {"type": ["object", "null"]},
    }
    return {
        "$schema": DIALECT,
        "title": "A config of fairchem-core 1.10 with fairchem-kd",
        "type": "object",
        "properties": blocks,
        "$defs": {f"loss.{name}": schema for name, schema in losses.items()},
    }


def _distillation() -> dict[str, Any]:
    """``task.distillation``, whose losses have options by their kind."""
    schema = _class(DistillationConfig, set())
    kinds = sorted(known_losses())
    by_kind = {
        "type": "object",
        "properties": {"kind": {"type": "string"}},
        "required": ["kind"],
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"$ref": f"#/$defs/loss.{kind}"},
            }
            for kind in kinds
        ],
    }
    nothing = {"type": "null"}
    schema["properties"]["losses"] = {
        "type": ["object", "null"],
        "description": "loss terms, each under its own name; null switches one off",
        "properties": {
            kind: {"anyOf": [nothing, {"$ref": f"#/$defs/loss.{kind}"}, by_kind]} for kind in kinds
        },
        "additionalProperties": {"anyOf": [nothing, by_kind]},
    }
    return schema


def _class(cls: type, more: set[str]) -> dict[str, Any]:
    """A dataclass of options: no other keys than its own, and ``more``."""
    hints = typing.get_type_hints(cls)
    properties: dict[str, Any] = {key: {"type": "string"} for key in sorted(more)}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        schema = _type(hints[field.name], field.metadata)
        if text := field.metadata.get("help"):
            schema["description"] = text
        properties[field.name] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _table(table: Mapping[str, Option]) -> dict[str, Any]:
    """A table of stock's keys, beside which a block may have others."""
    return {
        "type": "object",
        "properties": {key: _type(rule.kind, rule._asdict()) for key, rule in table.items()},
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _type(kind: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a value of a type may be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(one, meta) for one in args]}
    if kind is type(None):
        return {"type": "null"}
    if origin is list:
        return {"type": "array", "items": _type(args[0], {})}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1], {})}
    if dataclasses.is_dataclass(kind):
        # without any options, and from the command line, an empty value stands for the defaults
        return _or_null(_class(typing.cast("type", kind), set()))
    if kind is bool:
        return {"type": "boolean"}
    if kind is str:
        choices = meta.get("choices")
        return {"type": "string", "enum": list(choices)} if choices else {"type": "string"}
    if kind in (int, float):
        bounds = {"ge": "minimum", "gt": "exclusiveMinimum"}
        bounds |= {"le": "maximum", "lt": "exclusiveMaximum"}
        number = {"type": "integer" if kind is int else "number"}
        limits = {word: meta[key] for key, word in bounds.items() if meta.get(key) is not None}
        return {"anyOf": [number | limits, dict(_NUMBER_AS_TEXT)]}
    return {}
