"""Every layout of checkpoint since OCP: read as a teacher, or refused with reason and mend.

The files are made by ``fixtures/make_old_checkpoints.py``, with what each predicts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fixtures.make_old_checkpoints import FOLDER, SCALE_FILE, structure
from trainings import config, trainer, weights, write_lmdb

from fairchem_kd.commands import export as command
from fairchem_kd.errors import UserError
from fairchem_kd.features.describe import describe
from fairchem_kd.models.build import build, read_model_config
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.legacy import modern

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
READABLE = sorted(set(EXPECTED) - {"ocp_scale_file"})


def check_predictions(path: Path, name: str) -> None:
    """The teacher in ``path`` says what the layout ``name`` is expected to say."""
    teacher = Teacher.from_checkpoint(path, elements=["H", "O", "Cu"])
    batch = structure()
    physical = teacher.denormalized(teacher.forward(batch), batch)
    expected = {key: torch.tensor(value) for key, value in EXPECTED[name].items()}
    assert physical.keys() == expected.keys()
    torch.testing.assert_close(physical["energy"][0], expected["energy"], rtol=1e-5, atol=1e-5)
    if "forces" in expected:
        # smallest components are 1e-5 eV/Å
        torch.testing.assert_close(physical["forces"], expected["forces"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", READABLE)
def test_predictions(name: str) -> None:
    check_predictions(FOLDER / f"{name}.pt", name)


def test_the_fixtures_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 100_000


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_scale_file_that_is_here_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    contents = read_checkpoint(FOLDER / "ocp_scale_file.pt")
    file = Path(SCALE_FILE).with_suffix(suffix)
    contents["config"]["model_attributes"]["scale_file"] = str(file)
    path = write_checkpoint(contents, tmp_path / "teacher.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"unfitted scale factors.*{file}.*not here; put that"):
        Teacher.from_checkpoint(path)
    file.parent.mkdir(parents=True)
    scales = {"comment": "PaiNN", "upd_out_scalar_scale_0": 1.25}
    if suffix == ".json":
        file.write_text(json.dumps(scales))
    else:
        del scales["comment"]
        torch.save(scales, file)
    check_predictions(path, "ocp_scale_file")
    file.write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read"):
        Teacher.from_checkpoint(path)


def test_averaged_weights_follow_the_order_of_the_file() -> None:
    """Another release may have listed its parameters in another order."""
    contents = modern(read_checkpoint(FOLDER / "ocp_painn.pt"))
    names = [n for n in contents["state_dict"] if "scale_factor" not in n and "offset" not in n]
    shadow = dict(zip(names, contents["ema"]["shadow_params"], strict=True))
    state = contents["state_dict"]
    contents["state_dict"] = {name: state[name] for name in reversed(list(state))}
    contents["ema"]["shadow_params"] = [shadow[name] for name in reversed(names)]
    from fairchem_kd.models.build import build_model

    built = dict(build_model(contents, "reversed").named_parameters())
    for name, value in shadow.items():
        assert torch.equal(built[name], value), name


def test_a_relaxed_energy_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.from_checkpoint(FOLDER / "ocp_is2re.pt", elements=["H"])
    assert "energies of relaxed structures (IS2RE)" in caplog.text
    with pytest.raises(UserError, match="does not predict 'forces'"):
        teacher.require_outputs(["energy", "forces"])


def test_a_checkpoint_of_fairchem_2_is_refused() -> None:
    with pytest.raises(UserError, match=r"fairchem 2, which fairchem-core 1\.x cannot build; use"):
        Teacher.from_checkpoint(FOLDER / "fairchem_2.pt")


def _model(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda contents: contents["config"].update(model=name)


def _without_numbers(contents: dict[str, Any]) -> None:
    contents["normalizers"] = {}
    del contents["config"]["dataset"]["target_std"]


def _per_component(contents: dict[str, Any]) -> None:
    contents["normalizers"]["grad_target"]["std"] = torch.ones(3)


def _without_std(contents: dict[str, Any]) -> None:
    del contents["normalizers"]["target"]["std"]


def _other_ema(contents: dict[str, Any]) -> None:
    del contents["ema"]["shadow_params"][-1]


def _other_weights(contents: dict[str, Any]) -> None:
    contents["state_dict"]["module.module.no.weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_model("forcenet"), r"has no model 'forcenet' \(it has .*painn.*\); import"),
        (_without_numbers, r"normalised labels .* neither its normalizers nor .*target_mean"),
        (_per_component, r"normaliser 'grad_target' of 3 numbers"),
        (_without_std, r"normaliser 'target' without rmsd or std \(it has mean\)"),
        (_other_ema, r"averaged \(EMA\) weights .* use its best_checkpoint.pt"),
        (_other_weights, r"weights in .* do not fit the model .*no\.weight"),
    ],
)
def test_what_cannot_be_made_out_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    contents = read_checkpoint(FOLDER / "ocp_painn.pt")
    spoil(contents)
    path = write_checkpoint(contents, tmp_path / "teacher.pt")
    with pytest.raises(UserError, match=message) as refusal:
        Teacher.from_checkpoint(path)
    assert not re.search(r"\n", str(refusal.value))


def test_todays_layout_is_left_as_it_is() -> None:
    contents = read_checkpoint(FOLDER / "fairchem_1_hydra.pt")
    before = copy.deepcopy(contents["config"])
    brought = modern(contents)
    assert brought["config"] == contents["config"] == before
    assert brought["state_dict"] is contents["state_dict"]
    assert brought["normalizers"] == contents["normalizers"]


def test_an_old_checkpoint_can_be_inspected() -> None:
    path = FOLDER / "ocp_schnet.pt"
    report = describe(build(read_model_config(path), path))
    assert report["forces"] == "gradient"
    assert report["features"][0]["address"] == "node"


@pytest.mark.parametrize("name", READABLE)
def test_what_is_exported_loads_in_stock_fairchem(tmp_path: Path, name: str) -> None:
    """fairchem's own calculator takes it, and says the same."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    dest = tmp_path / "exported.pt"
    argv = [str(FOLDER / f"{name}.pt"), str(dest), "--elements", "H", "O", "Cu"]
    assert command.run(parser.parse_args(argv)) == 0
    check_predictions(dest, name)
    assert "model_attributes" not in torch.load(dest, weights_only=True)["config"]
    batch = structure()
    atoms = Atoms(batch.atomic_numbers.int(), batch.pos.numpy(), cell=batch.cell[0], pbc=True)
    logging.disable(logging.INFO)
    try:
        atoms.calc = OCPCalculator(checkpoint_path=dest, cpu=True, seed=0)
    finally:
        logging.disable(logging.NOTSET)
    expected = EXPECTED[name]
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"], rel=1e-5, abs=1e-5)
    if "forces" in expected:
        forces = atoms.calc.results["forces"]
        torch.testing.assert_close(
            torch.as_tensor(forces), torch.tensor(expected["forces"]), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("student", ["painn", "schnet"])
def test_an_old_teacher_teaches(tmp_path: Path, student: str) -> None:
    """Students with direct forces and with forces as a gradient, from a teacher of OCP."""
    write_lmdb(tmp_path / "train", 4, seed=0)
    write_lmdb(tmp_path / "val", 2, seed=9)
    losses: dict[str, Any] = {"n2n": {}, "vanilla": {}, "per_atom_energy": {}}
    arguments = config(
        tmp_path, tmp_path, model=student, teacher=FOLDER / "ocp_painn.pt", losses=losses,
        distillation={"statistics_samples": 2}, batch_size=2, max_epochs=1,
    )  # fmt: skip
    with trainer(arguments) as built:
        start = weights(built)
        built.train(disable_eval_tqdm=True)
        assert built.step == 2
        changed = [k for k, v in weights(built).items() if not torch.equal(v, start[k])]
        assert any("embed" in k or "atom_emb" in k for k in changed)
        assert all(torch.isfinite(v).all() for v in weights(built).values())
