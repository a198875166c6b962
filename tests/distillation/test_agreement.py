"""A teacher's error on the student's labels, and another zero of energy, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from trainings import assert_equal, config, interrupted, trained, trainer, write_lmdb, write_yaml
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.commands.main import main
from fairchem_kd.distillation import zero
from fairchem_kd.distillation.agreement import Agreement, _without_zero, agreement, tell_agreement
from fairchem_kd.errors import UserError


def test_the_errors_are_those_of_a_loop(tmp_path: Path, data: Path, teacher: Path) -> None:
    with trainer(config(tmp_path, data, teacher=teacher, losses={"vanilla": {}})) as built:
        built.make_distillation()
        live = built.distillation.teacher
        found = agreement(live, [], built.train_dataset, built.collater, built.device)
        assert found is not None
        energy, forces = [], []
        for index in range(len(built.train_dataset)):
            batch = built.collater([built.train_dataset[index]])
            said = live.teach(batch, [])
            energy.append(abs(float(said.outputs["energy"]) - float(batch.energy)))
            forces.append((said.outputs["forces"] - batch.forces).abs().flatten())
    assert found.structures == 11
    assert found.energy == pytest.approx(np.mean(energy), rel=1e-4)
    assert found.forces == pytest.approx(float(torch.cat(forces).mean()), rel=1e-4)


def test_what_is_left_beside_energies_of_the_elements() -> None:
    draw = np.random.default_rng(0)
    compositions = np.zeros((40, 120))
    compositions[:, [1, 6, 8]] = draw.integers(1, 6, (40, 3))
    noise = draw.normal(scale=0.01, size=40)
    shifted = compositions[:, [1, 6, 8]] @ [13.6, 1000.0, -2.0] + noise
    left = _without_zero(shifted, compositions)
    assert left is not None
    assert left < 0.02
    assert _without_zero(shifted[:11], compositions[:11]) is None  # too few to say


@pytest.mark.parametrize("compares", [True, False])
def test_another_zero_is_refused_where_energies_are_compared(
    compares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = Agreement(64, 14.0, 0.05, 0.03)
    if compares:
        with pytest.raises(UserError, match=r"different zeros: they differ by 14 eV .*0\.03 eV"):
            tell_agreement(other, compares)
    else:
        tell_agreement(other, compares)
        assert "this does no harm" in caplog.text
    for fine in (Agreement(64, 14.0, 3.0, 9.0), Agreement(64, 0.2, 0.1, 0.01), None,
                 Agreement(64, 14.0, 3.0, None), Agreement(64, None, 3.0, None)):  # fmt: skip
        tell_agreement(fine, compares_energies=True)


def test_a_training_says_how_its_teacher_does(
    tmp_path: Path, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    monkeypatch.setattr(logging, "disable", lambda *_: None)
    with caplog.at_level(logging.INFO), trainer(given) as built:
        built.set_up()
    (line,) = [r.getMessage() for r in caplog.records if "own labels" in r.getMessage()]
    assert "meV and forces" in line


#: eV for each atom of an element, by which the labels of `moved` differ from the teacher.
SHIFTS = {1: 5.0, 8: -430.25, 29: 61.5, 78: -1000.125}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Labels that are the teacher's own energies, but for an energy of each element."""
    root = tmp_path_factory.mktemp("moved")
    data = root / "data"
    write_lmdb(data / "val", 4, seed=50)
    write_lmdb(data / "before", 40, seed=0)
    given = config(root, data, teacher=teacher, losses={"vanilla": {}})
    given["dataset"]["train"]["src"] = str(data / "before")
    said: dict[int, float] = {}  # by the file's order, which a data set shuffles
    with trainer(given) as built:
        live = built.make_distillation()
        for index in range(40):
            batch = built.collater([built.train_dataset[index]])
            shift = sum(SHIFTS[int(z)] for z in batch.atomic_numbers.tolist())
            said[int(batch.sid[0])] = float(live.teach(batch, []).outputs["energy"]) + shift
    write_lmdb(data / "train", 40, seed=0, energy=lambda _, index: said[index])
    return data


def moved_config(root: Path, moved: Path, teacher: Path, zero: str = "labels") -> dict[str, Any]:
    """Of a training on them, with both losses that compare energies."""
    named = {"checkpoint": str(teacher), "energy_zero": zero}
    losses = {"vanilla": {"forces": 0}, "per_atom_energy": {}}
    return config(
        root, moved, losses=losses, distillation={"teacher": named}, batch_size=20, max_epochs=3
    )


def test_labels_with_another_zero_end_a_training_before_its_first_step(
    tmp_path: Path, moved: Path, teacher: Path
) -> None:
    given = moved_config(tmp_path, moved, teacher, zero="teacher")
    with (
        trainer(given) as built,
        pytest.raises(UserError, match=r"different zeros.*energy_zero: labels"),
    ):
        built.train(disable_eval_tqdm=True)


def test_a_teachers_energies_are_moved_to_the_labels_zero(
    tmp_path: Path, moved: Path, teacher: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "disable", lambda *_: None)
    with (
        caplog.at_level(logging.INFO),
        trainer(moved_config(tmp_path, moved, teacher)) as built,
    ):
        built.set_up()
        distillation = built.distillation
        shifts = distillation.zero.shifts
        for element, value in SHIFTS.items():
            assert float(shifts[element]) == pytest.approx(value, abs=2e-3)
        assert shifts[[6, 26]].isnan().all()
        batch = next(iter(built.train_loader))
        live = distillation.teacher.live
        with torch.no_grad(), distillation.tap_student() as features:
            out = built._forward(batch)
        inputs = distillation.compared(batch, out, features).inputs
        label = built.normalizers["energy"].norm(batch.energy)
        torch.testing.assert_close(
            inputs.teacher_outputs["energy"].view(-1), label, atol=2e-3, rtol=0
        )
        # what atoms give to the energy: each with its own element's shift, and the mean shared out
        said = live.teach(batch, distillation.teacher_requests).atom_energies["energy"].view(-1)
        for atom in (0, 12, len(said) - 1):
            shift = SHIFTS[int(batch.atomic_numbers[atom])]
            natoms = int(batch.natoms[batch.batch[atom]])
            expected = (float(said[atom]) + shift - 10.0 / natoms) / 2.0
            found = float(inputs.teacher_atom_energies["energy"][atom])
            assert found == pytest.approx(expected, abs=2e-3)
        with pytest.raises(UserError, match="The data holds C, which none of the labelled"):
            distillation.zero.check_elements(torch.tensor([1, 6]))
    told = [r.getMessage() for r in caplog.records]
    (line,) = [t for t in told if "are shifted by" in t]
    assert "O -430.2" in line
    assert "fitted to 40 labels: off by" in line
    (after,) = [t for t in told if "own labels" in t]
    assert float(after.partition("energy ")[2].split()[0]) < 1.0  # meV


def test_a_moved_zero_goes_on_bit_for_bit(tmp_path: Path, moved: Path, teacher: Path) -> None:
    """Of a run that ends after a step and is resumed, whose fit would be another by then."""
    whole = trained(moved_config(tmp_path / "whole", moved, teacher))
    given = moved_config(tmp_path / "parts", moved, teacher)
    given["optimizer"]["checkpoint_every"] = 1
    name = interrupted(given, step=3)
    assert_equal(trained({**given, "timestamp_id": name}), whole)
    other = moved_config(tmp_path / "parts", moved, teacher, zero="teacher")
    with (
        trainer(other, timestamp_id=name) as built,
        pytest.raises(UserError, match=r"teacher.energy_zero: this run was started with another"),
    ):
        built.train(disable_eval_tqdm=True)


def test_init_says_how_the_teacher_does_and_writes_the_zero(
    tmp_path: Path,
    moved: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for strategy, compares in (("vanilla", True), ("n2n", False)):
        write_yaml(tmp_path / "painn.yml", config(tmp_path, moved), cls="ocp")
        argv = ["init", "--student", "painn.yml", "--teacher", str(teacher)]
        assert main([*argv, "--strategy", strategy]) == 0
        shown = capsys.readouterr().out
        (line,) = [t for t in shown.splitlines() if "own labels: energy" in t]
        assert "meV off on average" in line
        assert "the zeros of the teacher's energies and of the student's labels differ" in shown
        block = yaml.safe_load((tmp_path / f"painn_{strategy}.yml").read_text())
        named = block["task"]["distillation"]["teacher"]
        assert named.get("energy_zero") == ("labels" if compares else None)
        told = "energy_zero: labels is written" if compares else "this does no harm"
        assert told in shown
        if compares:  # of energies alone, after the shift: not 1000 eV and more
            energy = float(shown.partition("vanilla.energy ")[2].split()[0])
            assert energy < 500  # as it is with the shift of some thousand eV taken out


def test_too_few_labels_tell_no_zero(tmp_path: Path, moved: Path, teacher: Path) -> None:
    given = moved_config(tmp_path, moved, teacher)
    given["dataset"]["train"]["train_split_settings"] = {"first_n": 8}
    with trainer(given, is_debug=True) as built, pytest.raises(UserError, match="8 labelled struc"):
        built.set_up()


def test_elements_that_few_samples_have_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [SimpleNamespace(atomic_numbers=torch.tensor([1, 8 if i == 7 else 6]))
               for i in range(90)]  # fmt: skip
    monkeypatch.setattr(zero, "SAMPLES", 9)
    assert sorted(zero._chosen(samples)) == [0, 7, 10, 20, 30, 40, 50, 60, 70, 80]
