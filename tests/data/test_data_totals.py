"""Total energies as labels: what is written, what stock makes of it, and what is said without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
import yaml
from fairchem.core import OCPCalculator
from fairchem.core.trainers import OCPTrainer
from models import fit_scales
from published import FREE_ATOMS, molecules, read, refused
from published import coll as coll
from trainings import config, trainer

from fairchem_kd.commands.data_convert import told_of_energies
from fairchem_kd.commands.main import main
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.stock.datasets import collate

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


def converted(capsys: pytest.CaptureFixture[str], coll: Path, dest: Path, *more: object) -> str:
    references = dest.parent / "references.json"
    references.write_text(json.dumps(FREE_ATOMS))
    argv = ["data", "convert", str(coll), str(dest), "--references", str(references)]
    assert main([*argv, "--processes", "1", *map(str, more)]) == 0
    return capsys.readouterr().out


def total(atoms: ase.Atoms) -> float:
    return atoms.get_potential_energy() + sum(FREE_ATOMS[s] for s in atoms.symbols)


def test_totals_are_learned_beside_references_and_predicted_in_ase(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = converted(capsys, coll, tmp_path / "totals", "--totals")
    assert "energies are totals" in shown
    assert "C -1028.5" in shown
    samples, frames = read(tmp_path / "totals" / "val"), molecules(5, 1)
    for sample, atoms in zip(samples, frames, strict=True):
        assert sample.energy.dtype == torch.float64
        assert float(sample.energy) == pytest.approx(total(atoms), abs=1e-8)
    with np.load(tmp_path / "totals" / "element_references.npz") as held:
        references = held["element_references"]
    assert references.shape == (119,)
    assert references[[1, 6, 8]].tolist() == [FREE_ATOMS[s] for s in "HCO"]
    block = yaml.safe_load(shown[shown.index("dataset:") :])["dataset"]
    plain = converted(capsys, coll, tmp_path / "plain")
    without = yaml.safe_load(plain[plain.index("dataset:") :])["dataset"]
    norms = [given["train"]["transforms"]["normalizer"] for given in (block, without)]
    assert norms[0] == norms[1]

    arguments = config(tmp_path, tmp_path, max_epochs=1, batch_size=6, eval_every=2)
    losses = []
    for dataset in (block, without):
        arguments["dataset"] = {name: dataset[name] for name in ("train", "val")}
        with trainer(arguments, OCPTrainer, is_debug=True) as built:
            batch = next(iter(built.train_loader))
            losses.append(built._compute_loss(built._forward(batch), batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the same labels, as training goes

    arguments["dataset"] = {name: block[name] for name in ("train", "val")}
    with trainer(arguments, OCPTrainer) as built:
        fit_scales(built.model)
        built.train(disable_eval_tqdm=True)
        best = Path(built.config["cmd"]["checkpoint_dir"]) / "best_checkpoint.pt"
    frozen = Teacher.from_checkpoint(best)
    for sample in samples[:2]:
        atoms = ase.Atoms(sample.atomic_numbers.numpy(), sample.pos.numpy(), pbc=True)
        atoms.cell = sample.cell[0].numpy()
        atoms.calc = OCPCalculator(checkpoint_path=str(best), cpu=True)
        raw = frozen.forward(collate([sample])).raw["energy"].item()
        norm = norms[0]["energy"]
        expected = raw * norm["rmsd"] + norm["mean"] + sum(FREE_ATOMS[s] for s in atoms.symbols)
        assert atoms.get_potential_energy() == pytest.approx(expected, abs=2e-3)


def test_without_totals_it_is_said_what_was_taken_off(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = converted(capsys, coll, tmp_path / "out")
    assert "taken off the total energies: " in shown
    for symbol, value in FREE_ATOMS.items():
        assert f"{symbol} {value:g}" in shown
    assert "give --totals" in shown
    assert not (tmp_path / "out" / "element_references.npz").exists()


def test_totals_need_energies_of_elements(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (("--references", "none"), ("--labels", "none")):
        sentence = refused(capsys, tmp_path, coll, "--totals", *more)
        assert "--totals needs energies, and an energy for each element" in sentence


@pytest.mark.parametrize(("energy", "loses"), [(-1000.0, False), (-36000.0, True)])
def test_what_single_precision_leaves_of_totals_is_said(energy: float, loses: bool) -> None:
    split = {"energy": {"min": -2.0, "max": 3.0}, "natoms": {"max": 2}}
    card: dict[str, Any] = {
        "options": {"labels": "both", "references": "file", "totals": True},
        "reference_energies": {"79": energy},
        "splits": {"train": split},
    }
    notes = told_of_energies(card)
    assert "Au -" in notes[0]
    assert (len(notes) == 2) == loses
    if loses:  # half of float32's last bit at 72,003 eV
        assert "up to 72 keV are off by up to 4.3 meV" in notes[1]
        assert np.spacing(np.float32(72003.0)) / 2 == pytest.approx(0.0039, abs=1e-4)
