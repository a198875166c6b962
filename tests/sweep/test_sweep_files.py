"""A sweep's folder whose files somebody else wrote, or a crash: one sentence, nothing run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import pytest
import yaml
from fuzz import chance, rounds
from sweeps import BASE

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.errors import UserError
from fairchem_kd.sweep.manifest import MANIFEST, _digest, check_config, read_manifest
from fairchem_kd.sweep.state import read_state, state_path, statuses


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    (root / "base.yml").write_text(yaml.safe_dump(BASE))
    sweep = {"base": "base.yml", "seeds": [1, 2], "grid": {"optim.max_epochs": [3, 4]}}
    (root / "sweep.yml").write_text(yaml.safe_dump(sweep))
    attacks.run(["sweep", "expand", "sweep.yml", "--out", "s"], root).went_on()
    return root


@pytest.fixture
def place(expanded: Path, tmp_path: Path) -> Path:
    shutil.copytree(expanded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edited(place: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as one would who knows its digest."""
    path = place / "s" / MANIFEST
    contents = json.loads(path.read_text())
    contents["directory"] = str(place)
    contents["sweep"] = str(place / "sweep.yml")
    edit(contents)
    contents["digest"] = _digest(contents)
    path.write_text(json.dumps(contents))


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(contents: dict[str, Any]) -> None:
        tree: Any = contents
        *above, last = key.split(".")
        for name in above:
            tree = tree[int(name) if name.isdigit() else name]
        tree[last] = value

    return edit


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    def edit(contents: dict[str, Any]) -> None:
        del (contents["runs"][0] if key in ("name", "seed", "values") else contents)[key]

    return edit


FIELDS: dict[str, list[Any]] = {
    "format": [None, "1", True, 0, -1, 1.5, [1]],
    "sweep": [None, 3, "a\nb", ["x"], "x" * 5000],
    "directory": [None, 3, {}, "\x1b[2J"],
    "runs": [None, 3, "x", {}, [3], [None], [[]], [{}]],
    "runs.0.name": [None, 3, "../../x", "", "a/b", "0123456789\n", "ABCDEF0123", ["0123456789"]],
    "runs.0.values": [None, 3, [], {"a\nb": 1}, {"\x1b": 1}],
    "runs.0.seed": [None, "1", 1.5, True, [1]],
    "runs.0.label": [None, 3, "a\nerror: fake", "x" * 5000],
    "runs.0.listed": [None, 1, "yes"],
    "runs.0.arguments": [
        None, "--seed 1", [3], ["--trainer=os.system"], ["--seed"], ["--seed", "--amp"],
        ["--checkpoint", "a", "--submit"], ["--amp", "--amp"], ["--config-yml", "evil.yml"],
    ],
    "runs.0.more": [1],
    "more": [1],
}  # fmt: skip


@pytest.mark.parametrize("key", FIELDS)
def test_each_field_of_a_manifest(place: Path, key: str) -> None:
    original = (place / "s" / MANIFEST).read_text()
    for value in FIELDS[key]:
        (place / "s" / MANIFEST).write_text(original)
        edited(place, put(key, value))
        with pytest.raises(UserError, match=r"manifest\.json (is not what|was written)") as refusal:
            read_manifest(place / "s")
        assert len(str(refusal.value)) < 600
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize("key", ["format", "sweep", "directory", "runs", "name", "seed", "values"])
def test_a_field_that_is_missing(place: Path, key: str) -> None:
    edited(place, drop(key))
    with pytest.raises(UserError, match="is not what fairchem-kd sweep writes"):
        read_manifest(place / "s")


def test_a_run_twice(place: Path) -> None:
    edited(place, lambda contents: contents["runs"].append(dict(contents["runs"][0])))
    with pytest.raises(UserError, match="twice"):
        read_manifest(place / "s")


def test_a_manifest_as_it_was_written_is_read(place: Path) -> None:
    edited(place, lambda contents: None)
    assert len(read_manifest(place / "s").runs) == 4
    edited(place, put("runs.0.arguments", ["--seed", "1", "--checkpoint", "a.pt", "--amp"]))
    assert read_manifest(place / "s").runs[0].arguments[-1] == "--amp"


TEXTS = {
    "empty": "",
    "a list": "[]",
    "cut off": '{"format": 1, "runs": [',
    "no text": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "deep keys": '{"a":' * 70 + "1" + "}" * 70,
    "a key twice": '{"format": 1, "format": 1}',
    "digits": '{"format": 1' + "0" * 5000 + "}",
    "half a character": '{"sweep": "\\ud800"}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_that_is_none(place: Path, name: str) -> None:
    text = TEXTS[name]
    (place / "s" / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in ("status", "collect", "run"):
        attacks.run(["sweep", command, "s"], place).sentence("s/manifest.json")


def test_a_pipe_and_a_folder_in_its_place(place: Path) -> None:
    import os

    (place / "s" / MANIFEST).unlink()
    os.mkfifo(place / "s" / MANIFEST)
    attacks.run(["sweep", "status", "s"], place).sentence("no regular file")
    (place / "s" / MANIFEST).unlink()
    (place / "s" / MANIFEST).mkdir()
    attacks.run(["sweep", "status", "s"], place).sentence("it is a folder")


STEPS = list(zip("abcdefgh", "bcdefghi", strict=True))
#: What YAML can grow to, by its aliases, its depth, or by merging.
BOMBS = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in STEPS),
    "merged laughs": "a: &a {k1: 1, k2: 2}\n"
    + "".join(
        f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 10)}]}}\n" for a, b in STEPS
    ),
    "long text": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 5000)}]\n",
    "itself": "a: &a {b: *a}\n",
    "itself in a list": "a: &a [*a]\n",
    "deep": "a: " + "[" * 1000 + "]" * 1000,
    "deep mappings": "a: " + "{a: " * 100 + "1" + "}" * 100,
    "an unknown tag": "a: !!python/object/apply:os.system ['touch canary']\n",
    "no number": "a: !!int ''\n",
    "no truth": "a: !!bool perhaps\n",
    "a list as key": "? [1, 2]\n: 3\n",
    "no text": "a: \x00\n",
    "two documents": "a: 1\n---\nb: 2\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_explodes(place: Path, name: str) -> None:
    (place / "evil.yml").write_text(BOMBS[name])
    attacks.run(["sweep", "expand", "evil.yml"], place).sentence("evil.yml")
    edited(place, lambda contents: None)
    manifest = read_manifest(place / "s")
    manifest.config_path(manifest.runs[0]).write_text(BOMBS[name])
    with pytest.raises(UserError, match=rf"{manifest.runs[0].name}\.yml"):
        check_config(manifest, manifest.runs[0])
    assert not (place / "canary").exists()


@pytest.mark.parametrize("name", ["laughs", "itself", "an unknown tag", "no number"])
def test_configs_and_what_they_include(place: Path, name: str) -> None:
    (place / "evil.yml").write_text(BOMBS[name])
    (place / "includes.yml").write_text("includes: [evil.yml]\n")
    argv = ["main", "--mode", "train", "--config-yml", "includes.yml", "--cpu"]
    attacks.run(argv, place, fairchem).sentence("evil.yml")
    attacks.run(["inspect", "evil.yml"], place).sentence("evil.yml")
    assert not (place / "canary").exists()


def test_includes_without_end(place: Path) -> None:
    for number in range(40):
        file = place / f"level{number}.yml"
        file.write_text(f"includes: [level{number + 1}.yml, level{number + 1}.yml]\n")
    (place / "level40.yml").write_text("a: 1\n")
    (place / "circle.yml").write_text("includes: [circle.yml]\n")
    for file, words in (("level0.yml", "more than 200 files"), ("circle.yml", "includes itself")):
        argv = ["main", "--mode", "train", "--config-yml", file, "--cpu"]
        attacks.run(argv, place, fairchem).sentence(words)


STATES_THAT_LIE: list[Any] = [
    [], None, 3, {"state": "gone"}, {"state": ["done"]}, {"state": "running", "pid": "1"},
    {"state": "running", "pid": 10**30}, {"state": "running", "pid": -1}, {"state": {}},
    {"state": "failed", "reason": 3}, {"state": "pending", "job": ["x"]}, {"job": "1"},
    {"state": "running", "host": 3}, {"state": "running", "started": 3},
]  # fmt: skip


def test_states_that_are_none_count_as_nothing(place: Path) -> None:
    edited(place, lambda contents: None)
    manifest = read_manifest(place / "s")
    for contents in STATES_THAT_LIE:
        path = state_path(manifest, manifest.runs[0])
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(contents))
        assert read_state(manifest, manifest.runs[0]) == {}
        assert statuses(manifest)[manifest.runs[0].name].state == "pending"


RECORDS = [
    '{"kind": "val", "seconds": 1, "step": 3}', '{"kind": "val", "seconds": 1, "metrics": {}}',
    '{"kind": "val", "seconds": 1, "step": "3", "metrics": {}}',
    '{"kind": "val", "seconds": 1, "step": 3, "metrics": {"energy_mae": "low"}}',
    '{"kind": "val", "seconds": 1, "step": 3, "metrics": {"energy_mae": [1]}}',
    '{"kind": "val", "seconds": 1, "step": 3, "metrics": {"a\\nb": 1}}',
    '{"kind": "val", "seconds": 1, "step": 3, "metrics": {"energy_mae": NaN}}',
    '{"kind": "val", "seconds": 1e999, "step": 3, "metrics": {}}',
    '{"kind": "train", "seconds": 1, "epoch": "far"}',
    '{"kind": "train", "seconds": 1, "epoch": []}',
    '{"kind": "config", "seconds": 1, "config": [1]}', '{"kind": "config", "seconds": 1}',
    '{"kind": "val", "seconds": 1, "step": 1' + "0" * 400 + ', "metrics": {}}', "\x00" * 50,
]  # fmt: skip


def test_records_that_are_none_are_passed_over(place: Path) -> None:
    edited(place, lambda contents: None)
    manifest = read_manifest(place / "s")
    folder = manifest.run_folder(manifest.runs[0])
    folder.mkdir(parents=True)
    good = '{"kind": "val", "seconds": 1, "step": 2, "epoch": 1, "metrics": {"energy_mae": 0.5}}'
    (folder / "records.jsonl").write_text("\n".join([*RECORDS, good, *RECORDS]) + "\n")
    said = attacks.run(["sweep", "collect", "s", "--partial"], place)
    said.went_on()
    assert "0.5" in said.out
    attacks.run(["sweep", "status", "s"], place).went_on()


def test_whatever_stands_in_a_manifest_is_read_or_refused(place: Path) -> None:
    """Seeded: any value anywhere in it, with a digest that fits."""
    luck = chance()
    path = place / "s" / MANIFEST
    original = path.read_text()
    values = [None, 0, -1, 10**12, 1.5, "", "a", "../x", "x" * 200, [], {}, [[]], {"a": {}}, True]
    keys = ["format", "sweep", "directory", "runs", "runs.0", "runs.3", "more"]
    keys += [f"runs.{n}.{k}" for n in range(4) for k in ("name", "values", "seed", "label")]
    keys += [f"runs.{n}.{k}" for n in range(4) for k in ("arguments", "listed", "x")]
    refused = 0
    for _ in range(rounds(300)):
        path.write_text(original)
        key, value = luck.choice(keys), luck.choice(values)
        edited(place, put(key, value) if key not in ("runs.0", "runs.3") else _row(key, value))
        try:
            for run in read_manifest(place / "s").runs:
                assert run.name.isalnum()
                assert set(run.arguments[::2]) <= {"--seed"}
        except UserError:
            refused += 1
    assert 0.5 * rounds(300) < refused < rounds(300)


def _row(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(contents: dict[str, Any]) -> None:
        contents["runs"][int(key[-1])] = value

    return edit
