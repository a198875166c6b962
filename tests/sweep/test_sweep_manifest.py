"""The folder of a sweep: its manifest and configs, kept and extended."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from sweeps import E2N, said, write
from sweeps import place as place

from fairchem_kd.commands.main import main
from fairchem_kd.sweep.manifest import expand, read_manifest, run_name
from fairchem_kd.sweep.state import statuses, write_state


def test_what_was_edited_by_hand_is_refused(place, capsys):
    path = str(write({"base": "base.yml", "seeds": [0, 1]}))
    assert main(["sweep", "expand", path]) == 0
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    config = manifest.config_path(manifest.runs[0])
    before = config.read_text()
    config.write_text(before.replace("max_epochs: 2", "max_epochs: 3"))
    sentence = said(capsys, "expand", path)
    assert f"{manifest.runs[0].name}.yml is not the config that its name stands for" in sentence
    config.write_text(before + "# a comment changes nothing\n")
    assert main(["sweep", "expand", path]) == 0
    config.unlink()
    assert main(["sweep", "expand", path]) == 0
    assert config.read_text() == before
    file = manifest.folder / "manifest.json"
    contents = json.loads(file.read_text())
    contents["runs"][0]["seed"] = 5
    file.write_text(json.dumps(contents))
    capsys.readouterr()
    for action in ("expand", "run", "status", "collect"):
        assert "manifest.json was edited by hand" in said(capsys, action, path)
    file.write_text("{")
    assert "cannot be read" in said(capsys, "status", path)


def test_a_folder_holds_one_sweep(place, capsys):
    assert main(["sweep", "expand", str(write({"base": "base.yml", "seeds": [0]}))]) == 0
    other = str(write({"base": "base.yml", "seeds": [0]}, "other.yml"))
    assert "--out" in said(capsys, "expand", other, "--out", "runs/sweeps/sweep")


def test_expanding_writes_configs_that_stand_alone(place, capsys):
    write({"includes": ["base.yml"], "optim": {"max_epochs": 4}}, "over.yml")
    path = write({"base": "over.yml", "grid": {f"{E2N}.coefficient": [1, 2]}, "seeds": [5]})
    assert main(["sweep", "expand", str(path), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "e2n.coefficient" in table
    assert table.count("pending: not started") == 2
    assert not Path("runs").exists()
    assert main(["sweep", "expand", str(path)]) == 0
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    assert [run.values for run in manifest.runs] == [{f"{E2N}.coefficient": c} for c in (1, 2)]
    for run in manifest.runs:
        config = yaml.safe_load(manifest.config_path(run).read_text())
        assert run_name(config, run.arguments) == run.name
        assert "includes" not in config
        assert config["optim"]["max_epochs"] == 4
        command = manifest.command(run)
        assert command[command.index("--timestamp-id") + 1] == run.name
        assert command[-2:] == ["--seed", "5"]


def test_editing_the_sweep_keeps_what_exists(place, capsys):
    grid = {f"{E2N}.coefficient": [1, 2]}
    path = write({"base": "base.yml", "grid": grid})
    one, two = expand(path).runs
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    for run in (one, two):
        manifest.run_folder(run).mkdir(parents=True)
        write_state(manifest, run, "done")
    grid[f"{E2N}.coefficient"] = [2, 3]
    manifest = expand(write({"base": "base.yml", "grid": grid}))
    found = statuses(manifest)
    assert [found[run.name].state for run in manifest.listed] == ["done", "pending"]
    assert manifest.listed[0].name == two.name
    assert [run.name for run in manifest.runs if not run.listed] == [one.name]
    assert main(["sweep", "status", str(path)]) == 0
    assert f"no longer: {one.name}" in capsys.readouterr().out
    grid[f"{E2N}.coefficient"] = [1]
    assert [run.name for run in expand(write({"base": "base.yml", "grid": grid})).listed] == [
        one.name
    ]
