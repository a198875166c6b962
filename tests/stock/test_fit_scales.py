"""Scale factors: fitted to what they are defined by, written, and loaded by fairchem."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.modules.scaling import ScaleFactor
from fairchem.core.modules.scaling.util import ensure_fitted
from models import batch, build_model, model_config, small_model, structures
from torch import nn
from trainings import config, write_lmdb, write_yaml

from fairchem_kd.commands import fit_scales as command
from fairchem_kd.errors import UserError
from fairchem_kd.stock import scales as fit_scales

# fairchem's loaders ask for pinned memory, with a GPU or without
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


def _batches() -> list[Any]:
    return [batch(structures(2, seed=seed)) for seed in (0, 5)]


def _factors(model: nn.Module) -> dict[str, ScaleFactor]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ScaleFactor)}


def _variance(values: torch.Tensor) -> float:
    return float(values.detach().double().var(dim=0).mean())


@pytest.mark.parametrize("flavour", ["gemnet_oc", "gemnet_oc_gradient", "painn", "painn_gradient"])
def test_every_factor_restores_the_variance(flavour: str) -> None:
    """The definition, in float64: scale^2 * sum n var(x) = sum n var(ref), or sum n without ref."""
    model = small_model(flavour, fitted=False)
    scales = fit_scales.fit_scale_factors(model, _batches())
    assert scales.keys() == _factors(model).keys()
    sums = {name: [0.0, 0.0] for name in scales}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x, ref = args[0], kwargs.get("ref")
            sums[name][0] += len(x) * _variance(x)
            sums[name][1] += len(x) * (1.0 if ref is None else _variance(ref))

        return hook

    for name, factor in _factors(model).items():
        factor.register_forward_pre_hook(watch(name), with_kwargs=True)
    with torch.no_grad():
        for structs in _batches():
            model(structs)
    for name, (before, wanted) in sums.items():
        assert scales[name] ** 2 * before == pytest.approx(wanted, rel=1e-4), name


def test_the_fit_starts_afresh_and_leaves_the_mode() -> None:
    model = small_model("gemnet_oc", fitted=False).train()
    first = fit_scales.fit_scale_factors(model, _batches())
    again = fit_scales.fit_scale_factors(model, _batches())
    assert again == first
    assert model.training
    assert all(f.index_fn is None and f.stats is None for f in _factors(model).values())
    assert not any(f._forward_hooks for f in _factors(model).values())


def test_only_so_many_batches_are_used() -> None:
    model = small_model("painn", fitted=False)
    one = fit_scales.fit_scale_factors(model, iter(_batches()), num_batches=1)
    assert one == fit_scales.fit_scale_factors(model, _batches()[:1])
    assert one != fit_scales.fit_scale_factors(model, _batches())


def test_a_model_without_factors_is_refused() -> None:
    with pytest.raises(UserError, match="SchNetWrap has no scale factors"):
        fit_scales.fit_scale_factors(small_model("schnet"), _batches())


def test_no_batches_are_refused() -> None:
    with pytest.raises(UserError, match="gave no batch"):
        fit_scales.fit_scale_factors(small_model("painn"), [])


def test_a_factor_without_variance_is_refused() -> None:
    model = small_model("gemnet_oc", fitted=False)
    with torch.no_grad():
        for parameter in model.int_blocks[1].quad_interaction.mlp_cbf.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match=r"1\.quad_interaction\.\S+ cannot be.*--num-batches"):
        fit_scales.fit_scale_factors(model, _batches())


def test_a_factor_that_takes_no_part_is_refused() -> None:
    model = small_model("painn", fitted=False)
    model.unused = ScaleFactor()
    with pytest.raises(UserError, match="scale factors unused take no part"):
        fit_scales.fit_scale_factors(model, _batches())


# -- the command ------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    write_lmdb(tmp_path / "data" / "train", 6, seed=0)
    write_lmdb(tmp_path / "data" / "val", 4, seed=9)
    return config(tmp_path, tmp_path / "data", model="gemnet_oc")


def _run(config_yml: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(
        parser.parse_args(["--config-yml", str(config_yml), "--cpu", "--num-batches", "2", *more])
    )


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_the_file_is_what_fairchem_loads(
    tmp_path: Path, arguments: dict[str, Any], suffix: str
) -> None:
    out = tmp_path / "scales" / f"s{suffix}"
    arguments["model"]["scale_file"] = str(out)  # not there yet: stock would stop at this
    assert _run(write_yaml(tmp_path / "c.yml", arguments, "ocp")) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    model = build_model(model_config("gemnet_oc", scale_file=str(out)), fitted=False)
    ensure_fitted(model)
    if suffix == ".json":
        scales = json.loads(out.read_text())
        for name, factor in _factors(model).items():
            assert float(factor.scale_factor) == pytest.approx(scales[name], rel=1e-6)


def test_a_hydra_is_told_the_key_that_works(
    tmp_path: Path, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "s.json"
    arguments["model"] = model_config("painn_hydra")
    path = write_yaml(tmp_path / "c.yml", arguments, "ocp")
    with pytest.raises(UserError, match=r"names no model\.backbone\.scale_file"):
        _run(path)
    arguments["model"]["backbone"]["scale_file"] = str(out)  # not there yet
    with caplog.at_level("INFO"):
        assert _run(write_yaml(tmp_path / "c.yml", arguments, "ocp")) == 0
    (line,) = [r.getMessage() for r in caplog.records if "scale factors to" in r.getMessage()]
    assert f"{out}; set model.backbone.scale_file to use them" in line
    ensure_fitted(build_model(arguments["model"], fitted=False))
    arguments["model"] = model_config("painn_hydra", scale_file=str(out))
    with pytest.raises(UserError, match=r"move it to model\.backbone\.scale_file"):
        _run(write_yaml(tmp_path / "c.yml", arguments, "ocp"), "--out", str(out))


def test_out_wins_over_the_config(tmp_path: Path, arguments: dict[str, Any]) -> None:
    arguments["model"] = model_config("painn", scale_file=str(tmp_path / "other.json"))
    path = write_yaml(tmp_path / "c.yml", arguments, "fairchem_kd.DistillationTrainer")
    assert _run(path, "--out", str(tmp_path / "mine.json")) == 0
    assert (tmp_path / "mine.json").is_file()
    assert not (tmp_path / "other.json").exists()


def test_a_fit_that_fails_leaves_the_old_file(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments["model"] = model_config("painn")
    out = tmp_path / "s.json"
    out.write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        _run(write_yaml(tmp_path / "c.yml", arguments, "ocp"), "--out", str(out))
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".s.json*"))


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (lambda a: None, (), "names no model.scale_file: say where to write with --out"),
        (lambda a: None, ("--out", "s.npz"), r"must end in \.json or \.pt"),
        (lambda a: a["model"].pop("name"), ("--out", "s.json"), "no model.name"),
        (lambda a: a["dataset"].pop("train"), ("--out", "s.json"), r"no dataset\.train\.src"),
        (
            lambda a: a["dataset"]["train"].update(src="no/where"),
            ("--out", "s.json"),
            r"dataset\.train.*no/where",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path, arguments: dict[str, Any], spoil: Any, more: tuple[str, ...], message: str
) -> None:
    spoil(arguments)
    path = write_yaml(tmp_path / "c.yml", arguments, "ocp")
    with pytest.raises(UserError, match=message):
        _run(path, *more)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yml does not exist"):
        _run(tmp_path / "no.yml")
