"""The JSON schema of configs: it takes every shipped config, and refuses what a run refuses."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import ROOT

from fairchem_kd.commands.main import main
from fairchem_kd.distillation.json_schema import config_schema

CONFIGS = sorted(
    path for path in (ROOT / "yaml_configs").rglob("*.yml") if "sweeps" not in path.parts
)
SCHEMA = config_schema()
_TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
_BOUNDS = {
    "minimum": lambda v, b: v >= b,
    "maximum": lambda v, b: v <= b,
    "exclusiveMinimum": lambda v, b: v > b,
    "exclusiveMaximum": lambda v, b: v < b,
}
_KNOWN = {
    *("$schema", "$defs", "title", "description", "type", "enum", "const", "pattern", "$ref"),
    *("properties", "additionalProperties", "required", "items", "anyOf", "allOf", "if", "then"),
    *_BOUNDS,
}


def fits(value: Any, schema: Any) -> bool:
    """What the draft of 2020-12 says, of the words that the schema uses."""
    if isinstance(schema, bool):
        return schema
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if "$ref" in schema and not fits(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]):
        return False
    kinds = schema.get("type", list(_TYPES))
    if not any(_TYPES[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return False
    if any(word in schema and not holds(value, schema[word]) for word, holds in _BOUNDS.items()):
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if not all(fits(value, one) for one in schema.get("allOf", ())):
        return False
    if "if" in schema and fits(value, schema["if"]) and not fits(value, schema["then"]):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(fits(one, schema["items"]) for one in value)
    if not isinstance(value, dict):
        return True
    own = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    return all(key in value for key in schema.get("required", ())) and all(
        fits(inner, own.get(key, more)) for key, inner in value.items()
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_fits(path: Path) -> None:
    assert fits(yaml.safe_load(path.read_text()), SCHEMA)


def with_distillation(**block: Any) -> dict[str, Any]:
    return {"task": {"distillation": block}}


GOOD = [
    {},
    {"optim": {"lr_initial": "1e-4", "batch_size": 3, "something": 1}},
    {"dataset": [{"src": "x"}], "task": {"dataset": "trajectory_lmdb"}},
    with_distillation(losses=None, teacher={"checkpoint": "a.pt"}),
    with_distillation(losses={"n2n": {}, "v2v": None}),
    with_distillation(losses={"early": {"kind": "n2n", "student": "node@1", "coefficient": 2}}),
    with_distillation(losses={"mine": {"kind": "my_losses.Mine", "whatever": 1}}),
    with_distillation(losses={"n2n": {"schedule": {"stop": 0.5, "decay": "cosine"}}}),
    with_distillation(rattle={"std": [0.03, 0.1]}),
]
BAD = [
    {"optim": {"lr_initial": 0}},
    {"optim": {"batch_size": 2.5}},
    {"optim": {"max_epochs": True}},
    {"optim": {"ema_decay": 1}},
    {"dataset": {"train": {"first_n": 0}}},
    with_distillation(losses={"n2n": {"studnt": "node"}}),
    with_distillation(losses={"n2n": 3}),
    with_distillation(losses={"n2n": {"coefficient": -1}}),
    with_distillation(losses={"early": {"student": "node@1"}}),
    with_distillation(losses={"early": {"kind": "n2n", "fn": "mean"}}),
    with_distillation(teacher={"chekpoint": "a.pt"}),
    with_distillation(teacher={"precision": "fp8"}),
    with_distillation(los={}),
    with_distillation(statistics_samples=0),
]


@pytest.mark.parametrize("config", GOOD)
def test_what_a_run_takes_fits(config: dict[str, Any]) -> None:
    assert fits(config, SCHEMA)


@pytest.mark.parametrize("config", BAD)
def test_what_a_run_refuses_does_not(config: dict[str, Any]) -> None:
    assert not fits(config, SCHEMA)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.schema.json"
    assert main(["configs", "--schema", str(path)]) == 0
    assert json.loads(path.read_text()) == json.loads(json.dumps(copy.deepcopy(SCHEMA)))
    assert "yaml-language-server: $schema=" in capsys.readouterr().out
    assert main(["configs", "--schema", str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["configs", "--schema", str(path), "--force"]) == 0
    assert main(["configs", "--schema", str(tmp_path / "gone" / "a.json")]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
