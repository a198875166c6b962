"""Published files that are not converted, or only with a note."""

from __future__ import annotations

from pathlib import Path

import ase
import ase.db
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from published import coll as coll
from published import coll_text, molecules, refused, write_oc20

from fairchem_kd.commands.main import main
from fairchem_kd.data.card import read_card


def test_sources_that_cannot_be_read(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*argv: object) -> str:
        return refused(capsys, tmp_path, *argv)

    (tmp_path / "empty").mkdir()
    assert "no file of structures" in say(tmp_path / "empty")
    (tmp_path / "empty" / "train.xyz").write_text("")
    assert "no frames" in say(tmp_path / "empty")
    assert "does not exist" in say(tmp_path / "nowhere")
    (tmp_path / "text.xyz").write_text("hello\n")
    assert "not extended xyz: frame 0 begins with 'hello'" in say(tmp_path / "text.xyz")
    text = coll_text(molecules(2, 0))
    (tmp_path / "cut.xyz").write_text(text[: len(text) - 200])
    assert "cut.xyz" in say(tmp_path / "cut.xyz")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a_train.xyz").write_text(text)
    (tmp_path / "odd" / "b.xyz").write_text(text)
    assert "b.xyz says no split" in say(tmp_path / "odd")
    file = coll / "coll_v1.2_AE_val.xyz"
    assert "--group" in say(file, "--split", "0.5/0.5")
    assert "add up to 1" in say(file, "--split", "0.5/0.1")
    assert "contradict" in say(file, "--split", "0.5/0.5", "--into", "val")
    assert "no unit of energy" in say(file, "--force-unit", "Hartre/Bohr")
    assert "no such key (did you mean" in say(file, "--group", "atomization_energ")


def test_pairs_of_unequal_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "pairs"
    write_oc20(source, 0, [(1, 3)], 0)
    lines = (source / "0.txt").read_text().splitlines(keepends=True)
    (source / "0.txt").write_text("".join(lines[:2]))
    assert "has 2 lines, but 0.extxyz.xz more frames" in refused(capsys, tmp_path, source)
    (source / "0.txt").write_text("".join(lines) + lines[0])
    assert "fewer frames than 0.txt has lines" in refused(capsys, tmp_path, source)
    (source / "0.txt").write_text("a b c\n" * 3)
    assert "not a .txt of OC20" in refused(capsys, tmp_path, source)


def test_labels_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(frames: list[ase.Atoms], *argv: object) -> str:
        for name in (tmp_path / "frames").glob("*"):
            name.unlink()
        (tmp_path / "frames").mkdir(exist_ok=True)
        ase.io.write(tmp_path / "frames" / "a.xyz", frames, format="extxyz")
        return refused(capsys, tmp_path, tmp_path / "frames", *argv)

    frames = molecules(4, 0)
    for atoms in frames:
        energy = atoms.get_potential_energy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
    assert "no forces under 'forces'; name" in say(frames)
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, forces=np.ones((len(atoms), 3)))
        atoms.info["energies"] = 1.0
    assert "no energy under 'energy' (did you mean 'energies'?)" in say(frames)
    frames = molecules(4, 0)
    forces = frames[1].get_forces()
    forces[0, 0] = np.nan
    frames[1].calc = SinglePointCalculator(frames[1], energy=1.0, forces=forces)
    assert "1 of 4 frames cannot be used (1 not finite)" in say(frames)
    frames = molecules(2, 0)
    frames[0].positions[0] += 40.0
    assert "Å long, so a cell of 40 Å leaves less than 12 Å" in say(frames)


def test_mixed_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mixed"
    source.mkdir()
    (source / "a_train.xyz").write_text(coll_text(molecules(24, 0, ("H2O", "H2O"))))
    (source / "b_val.xyz").write_text(coll_text(molecules(4, 0, ("CO2",))))
    assert "The split val holds C, which train does not" in refused(capsys, tmp_path, source)
    frames = molecules(24, 1, ("H2O", "H2O"))
    for atoms in frames:
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces() * 51.4}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["atomization_energy"] = 1.0
    (source / "b_val.xyz").unlink()
    ase.io.write(source / "b_train.xyz", frames, format="extxyz")
    assert "so their units seem to differ" in refused(capsys, tmp_path, source)


def test_what_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is certainly wrong, and so nothing that is refused."""
    monkeypatch.chdir(tmp_path)
    Path("xyz").mkdir()

    def notes(*argv: str, **files: list[ase.Atoms]) -> list[str]:
        for file in Path("xyz").iterdir():
            file.unlink()
        for name, frames in files.items():
            Path("xyz", f"{name}.xyz").write_text(coll_text(frames))
        assert main(["data", "convert", "xyz", "out", "--processes", "1", "--force", *argv]) == 0
        told = capsys.readouterr().out.splitlines()
        shown = [line for line in told if "note: " in line and "taken off the total" not in line]
        assert read_card(Path("out"))["notes"] == [line.removeprefix("note: ") for line in shown]
        return read_card(Path("out"))["notes"]

    train, val = molecules(24, 0), molecules(8, 1)
    assert notes(train=train, val=val) == []
    assert notes(train=train + train[:3], val=val + train[:2]) == [
        "3 of the 27 frames of train are there already.",
        "2 structures of val are in train too: errors on val look better than they are.",
    ]
    [said] = notes("--force-unit", "Hartree/Angstrom", "--energy-unit", "meV", train=train)
    assert "are --energy-unit and --force-unit right" in said
    [said] = notes(
        "--references", "fit", "--allow-mixed", train=molecules(24, 0, ("H2O", "H2")), val=val
    )
    assert said.startswith("val holds C, for which train gives no reference energy")


def test_what_is_refused_leaves_nothing(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the hidden folder, where no part of it is complete."""

    def say(*argv: object) -> str:
        sentence = refused(capsys, tmp_path, *argv)
        assert [path.name for path in tmp_path.glob(".*.converting")] == []
        return sentence

    assert "there is no energy under 'e'" in say(coll, "--energy-key", "e")
    for name in ("a/b", "../train", "", "."):
        assert "a split is a folder in DEST" in say(coll, "--into", name)
