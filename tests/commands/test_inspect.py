"""`fairchem-kd inspect`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml

from fairchem_kd.commands.main import main
from fairchem_kd.features import available_features
from fairchem_kd.features.describe import describe


def save_checkpoint(path: Path, flavour: str, **overrides: Any) -> Path:
    """What fairchem's trainers write, as far as it matters here."""
    config = {"model": models.model_config(flavour, **overrides), "trainer": "ocp"}
    state = {f"module.{k}": v for k, v in models.small_model(flavour).state_dict().items()}
    torch.save({"config": config, "state_dict": state, "epoch": 1, "step": 2}, path)
    return path


def inspect_json(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("flavour", sorted(models.CONFIGS))
def test_every_offered_feature_fires_once(
    flavour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect_json(save_checkpoint(tmp_path / "a.pt", flavour), capsys)
    model = models.small_model(flavour)
    specs = available_features(model)
    assert [feature["address"] for feature in report["features"]] == list(specs)
    for feature in report["features"]:
        spec = specs[feature["address"]]
        assert feature == {
            "address": spec.address,
            "kind": spec.kind,
            "shape": spec.shape,
            "channels": spec.channels,
            "fires": 1,
            "description": spec.description,
        }
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["cutoff"] == 4.5
    assert report["elements"] is None
    forces = {"gradient": "gradient", "energy": "none"}.get(flavour.split("_")[-1], "direct")
    assert report["forces"] == ("gradient" if flavour == "schnet" else forces)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_checkpoint(tmp_path / "teacher.pt", "gemnet_oc")
    path.with_suffix(".json").write_text('{"elements": ["H", "O", "Cu"]}')
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert f"{path}: GemNetOC, 25,288 parameters" in table
    assert "elements: H O Cu (the embedding has rows for 1 to 83)" in table
    rows = {line.split()[0]: line for line in table.splitlines() if line}
    assert "(E, 20)" in rows["edge@2"]
    assert "(N, 3, 20)" in rows["vector"]
    assert "x_E, the input of the energy head" in rows["node"]


def test_a_config_with_includes_and_a_missing_scale_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.model_config("gemnet_oc_gradient", use_pbc=False, scale_file="missing.pt")
    (tmp_path / "model.yml").write_text(yaml.safe_dump({"model": model}))
    config = tmp_path / "run.yml"
    config.write_text("includes: [model.yml]\ntrainer: ocp\n")
    report = inspect_json(config, capsys)
    assert report["model"] == "GemNetOC"
    assert {feature["fires"] for feature in report["features"]} == {1}


def test_a_wrapper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yml"
    model = models.model_config("painn", name="painn_kd", features=["node"])
    config.write_text(yaml.safe_dump({"model": model}))
    report = inspect_json(config, capsys)
    assert report["model"] == "PaiNNKD"
    assert {feature["fires"] for feature in report["features"]} == {1}


def test_firings_are_measured() -> None:
    """A model that runs a layer twice shows it."""
    model = models.small_model("schnet_energy")
    run = model.lin2.forward
    model.lin2.forward = lambda h: run(h) + 0 * model.embedding(torch.tensor([1])).sum()
    fires = {feature["address"]: feature["fires"] for feature in describe(model)["features"]}
    assert fires["node@0"] == 2
    assert fires["node"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.yml", None, "gone.yml: no such config"),
        ("gone.pt", None, "gone.pt does not exist"),
        ("a.yml", "model: [", "this config cannot be read"),
        ("a.yml", "- 1\n- 2\n", "not a mapping"),
        ("a.yml", "", "not a mapping"),
        ("a.yml", "trainer: ocp", "there is no model block with a name"),
        ("a.yml", "includes: [nowhere.yml]", "this config cannot be read"),
        ("a.yml", "model: {name: pain}", "fairchem has no model 'pain'"),
        ("a.yml", "model: {name: painn, hiden: 3}", "'painn' cannot be built: .*hiden"),
        ("a.yml", "model: {name: painn, rbf: {name: gausian}}", "cannot be built: .*gausian"),
        (
            "a.yml",
            "model: {name: dimenetplusplus, num_spherical: 2, num_radial: 2}",
            "features of DimeNetPlusPlusWrap cannot be extracted; supported .* GemNetOC, PaiNN",
        ),
        ("a.pt", "not a checkpoint", "not a PyTorch checkpoint"),
    ],
)
def test_bad_input(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert main(["inspect", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err), output.err


def test_a_broken_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_checkpoint(tmp_path / "a.pt", "schnet")
    path.with_suffix(".json").write_text("{")
    assert main(["inspect", str(path)]) == 2
    assert "a.json of the checkpoint cannot be read" in capsys.readouterr().err
