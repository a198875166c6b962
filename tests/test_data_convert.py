"""Published files to fairchem's LMDB: what is written, what is refused, and that it trains."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.datasets import LmdbDataset
from models import structures
from trainings import config, trainer

from fairchem_kd.cli import main
from fairchem_kd.data import sources
from fairchem_kd.data.assemble import Conversion
from fairchem_kd.data.card import read_card
from fairchem_kd.data.convert import convert, split_for
from fairchem_kd.data.labels import Reading
from fairchem_kd.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

FREE_ATOMS = {"H": -13.6, "C": -1028.5, "O": -2041.3}  # eV; any numbers do


def with_labels(atoms: ase.Atoms, calculator: EMT) -> ase.Atoms:
    """``atoms`` with energy and forces as numbers, which files can hold."""
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    atoms.info.clear()  # what ase.build knows of a surface is nothing that xyz can hold
    return atoms


def molecules(
    count: int, seed: int, names: tuple[str, ...] = ("H2O", "CH4", "CO2", "C2H6")
) -> list[ase.Atoms]:
    """Rattled molecules with EMT labels, far from the origin and without a cell."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        atoms = molecule(names[index % len(names)])
        atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape) + 100.0
        found.append(with_labels(atoms, EMT()))
    return found


def coll_text(frames: list[ase.Atoms]) -> str:
    """As COLL is published: species, positions, forces; total and atomization energy at the end."""
    text = ""
    for atoms in frames:
        relative = atoms.get_potential_energy()
        total = relative + sum(FREE_ATOMS[s] for s in atoms.symbols)
        text += f"{len(atoms)}\nProperties=species:S:1:pos:R:3:forces:R:3 "
        text += f'pbc="F F F" energy={total:.10f} atomization_energy={relative:.10f}\n'
        for symbol, x, f in zip(atoms.symbols, atoms.positions, atoms.get_forces(), strict=True):
            text += f"{symbol:2} " + " ".join(f"{v:16.8f}" for v in (*x, *f)) + "\n"
    return text


def write_oc20(folder: Path, number: int, systems: list[tuple[int, int]], seed: int) -> list[Any]:
    """A pair as OC20 is published; ``systems`` are (random id, frames). Returns what is in it."""
    folder.mkdir(exist_ok=True)
    text, log, held = "", "", []
    for system, frames in systems:
        for frame in range(frames):
            atoms = structures(4, seed=seed + frame, std=0.1)[system % 4]
            energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
            free = np.ones(len(atoms), dtype=int)
            free[atoms.constraints[0].index] = 0
            cell = " ".join(f"{v:.8f}" for v in np.array(atoms.cell).ravel())
            text += f'{len(atoms)}\nLattice="{cell}" Properties=species:S:1:pos:R:3:move_mask:L:1:'
            text += (
                f'tags:I:1:forces:R:3 energy={energy:.8f} free_energy={energy:.8f} pbc="T T T"\n'
            )
            for i, atom in enumerate(atoms):
                row = " ".join(f"{v:.8f}" for v in atom.position)
                labels = " ".join(f"{v:.8f}" for v in forces[i])
                text += f"{atom.symbol} {row} {'FT'[free[i]]} {atom.tag} {labels}\n"
            reference = 10.0 + system
            log += f"random{system},frame{frame * 3},{reference}\n"
            held.append((system, frame * 3, energy - reference, atoms, forces, 1 - free))
    (folder / f"{number}.extxyz.xz").write_bytes(lzma.compress(text.encode()))
    (folder / f"{number}.txt").write_text(log)
    return held


def read(folder: Path) -> list[Any]:
    dataset = LmdbDataset({"src": str(folder)})
    found = [dataset[index] for index in range(len(dataset))]
    natoms = np.load(folder / "metadata.npz")["natoms"]
    assert natoms.tolist() == [sample.natoms for sample in found]
    return found


@pytest.fixture(scope="module")
def coll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of COLL's three files."""
    root = tmp_path_factory.mktemp("coll")
    for seed, (split, count) in enumerate((("train", 12), ("val", 5), ("test", 4))):
        text = coll_text(molecules(count, seed))
        (root / f"coll_v1.2_AE_{split}.xyz").write_text(text)
    return root


def test_coll(
    tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FRAMES_PER_PART", 5)  # 12 frames: three shards, in order
    dest = tmp_path / "coll"
    assert main(["data", "convert", str(coll), str(dest), "--processes", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"src: {dest / 'train'}" in shown
    assert len(list((dest / "train").glob("*.lmdb"))) == 3
    for seed, (split, count) in enumerate((("train", 12), ("val", 5), ("test", 4))):
        samples, expected = read(dest / split), molecules(count, seed)
        assert len(samples) == count
        for sample, atoms in zip(samples, expected, strict=True):
            assert sample.atomic_numbers.tolist() == atoms.numbers.tolist()
            assert sample.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
            np.testing.assert_allclose(sample.forces, atoms.get_forces(), atol=1e-5)
            distances = torch.cdist(sample.pos.double(), sample.pos.double())
            np.testing.assert_allclose(distances, atoms.get_all_distances(), atol=2e-5)
            assert torch.equal(sample.cell, 40 * torch.eye(3)[None])
            assert sample.pbc.tolist() == [[True] * 3]
            middle = (sample.pos.amin(0) + sample.pos.amax(0)) / 2
            np.testing.assert_allclose(middle, 20.0, atol=1e-4)
            assert set(sample.tags.tolist()) == {2}
            assert not sample.fixed.any()
    card = read_card(dest)
    assert card is not None
    named = {ase.Atoms(numbers=[int(z)]).symbols[0]: e
             for z, e in card["reference_energies"].items()}  # fmt: skip
    assert named == pytest.approx(FREE_ATOMS, abs=1e-4)
    energies = [atoms.get_potential_energy() for atoms in molecules(12, 0)]
    assert card["normalizer"]["energy"]["mean"] == pytest.approx(np.mean(energies), abs=1e-6)
    assert card["normalizer"]["energy"]["rmsd"] == pytest.approx(np.std(energies), abs=1e-6)
    assert card["splits"]["train"]["force_rms"] == pytest.approx(
        np.sqrt(np.mean(np.concatenate([a.get_forces() for a in molecules(12, 0)]) ** 2)), rel=1e-5
    )
    assert not list(tmp_path.glob(".coll.conv*"))


def test_oc20(tmp_path: Path) -> None:
    source = tmp_path / "s2ef_train_200K"
    held = write_oc20(source, 0, [(5, 2), (7, 2)], 0) + write_oc20(source, 1, [(2, 1)], 9)
    reading = Reading(references="oc20", group="system")
    card = convert(Conversion((source,), reading), tmp_path / "oc20", 1)
    samples = read(tmp_path / "oc20" / "train")
    assert len(samples) == len(held) == 5
    for sample, (system, fid, energy, atoms, forces, fixed) in zip(samples, held, strict=True):
        assert (sample.sid, sample.fid) == (system, fid)
        assert sample.energy == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(sample.pos, atoms.positions, atol=1e-5)
        np.testing.assert_allclose(sample.cell[0], np.array(atoms.cell), atol=1e-5)
        np.testing.assert_allclose(sample.forces, forces, atol=1e-5)  # constraints not applied
        assert sample.tags.tolist() == atoms.get_tags().tolist()
        assert sample.fixed.tolist() == fixed.tolist()
    assert np.abs(held[0][4][held[0][5] == 1]).max() > 1e-3
    assert card["reference_energies"] is None
    assert card["splits"]["train"]["trajectories"] == 3
    free = np.concatenate([forces[fixed == 0] for *_, forces, fixed in held])
    assert card["normalizer"]["forces"]["rmsd"] == pytest.approx(
        np.sqrt((free**2).mean()), rel=1e-5
    )


def test_a_split_keeps_systems_together(tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    write_oc20(source, 0, [(n, 2) for n in range(8)], 0)
    write_oc20(source, 1, [(n, 1) for n in range(5, 11)], 50)  # some systems in both files
    found = []
    for name, seed, processes in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        conversion = Conversion(
            (source,), Reading(references="oc20", group="system"), shares=(0.6, 0.4), seed=seed,
            allow_mixed=True,
        )  # fmt: skip
        convert(conversion, tmp_path / name, processes)
        found.append(
            {
                split: [(s.sid, s.fid) for s in read(tmp_path / name / split)]
                for split in ("train", "val")
            }
        )
        sids = {split: {sid for sid, _ in ids} for split, ids in found[-1].items()}
        assert not sids["train"] & sids["val"]
        assert sum(len(ids) for ids in found[-1].values()) == 22
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_shares_are_met() -> None:
    names = [split_for(str(n), 0, (0.7, 0.2, 0.1)) for n in range(4000)]
    counts = [names.count(split) / 4000 for split in ("train", "val", "test")]
    assert counts == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


@pytest.mark.parametrize("kind", ["traj", "db", "extxyz.gz"])
def test_what_ase_reads(tmp_path: Path, kind: str) -> None:
    """Total energies, and references by least squares."""
    slabs = structures(4, seed=3) + structures(4, seed=4)
    frames = [with_labels(atoms, EMT()) for atoms in slabs]
    path = tmp_path / f"frames.{kind}"
    if kind == "db":
        with ase.db.connect(path) as database:
            for index, atoms in enumerate(frames):
                database.write(atoms, run=index // 4)
    else:
        ase.io.write(path, frames)
    reading = Reading(group="run" if kind == "db" else "frame")
    card = convert(Conversion((path,), reading), tmp_path / "out", 1)
    samples = read(tmp_path / "out" / "train")
    totals = np.array([atoms.calc.results["energy"] for atoms in frames])
    elements = sorted({z for atoms in frames for z in atoms.numbers})
    assert card["elements"] == elements
    counts = np.array([[(a.numbers == z).sum() for z in elements] for a in frames], float)
    best = np.linalg.lstsq(counts, totals, rcond=None)[0]
    labels = np.array([sample.energy for sample in samples])
    np.testing.assert_allclose(labels, totals - counts @ best, atol=1e-4)
    references = card["reference_energies"]
    restored = labels + counts @ [references[str(z)] for z in elements]
    np.testing.assert_allclose(restored, totals, atol=1e-6)
    for sample, atoms in zip(samples, frames, strict=True):
        np.testing.assert_allclose(sample.forces, atoms.calc.results["forces"], atol=1e-5)
        assert sample.fixed.sum() == len(atoms.constraints[0].index)
    if kind == "db":
        assert [sample.sid for sample in samples] == [0] * 4 + [1] * 4


def test_units(tmp_path: Path) -> None:
    """Hartree and Bohr, under keys of one's own."""
    frames = molecules(3, 0)
    expected = [(a.get_potential_energy(), a.get_forces(), a.get_all_distances()) for a in frames]
    for atoms, (energy, forces, _) in zip(frames, expected, strict=True):
        atoms.calc = None
        atoms.info["dft_energy"] = energy / 27.211386
        atoms.arrays["dft_forces"] = forces / 51.422067
        atoms.positions /= 0.52917721
    ase.io.write(tmp_path / "bohr.xyz", frames, format="extxyz")
    reading = Reading(
        references="none", energy_key="dft_energy", forces_key="dft_forces",
        energy_unit="Hartree", length_unit="Bohr",
    )  # fmt: skip
    assert reading.force_factor == pytest.approx(51.422067, rel=1e-6)
    convert(Conversion((tmp_path / "bohr.xyz",), reading), tmp_path / "out", 1)
    samples = read(tmp_path / "out" / "train")
    for sample, (energy, forces, distances) in zip(samples, expected, strict=True):
        assert sample.energy == pytest.approx(energy, rel=1e-5)
        np.testing.assert_allclose(sample.forces, forces, rtol=1e-4, atol=1e-5)
        found = torch.cdist(sample.pos.double(), sample.pos.double())
        np.testing.assert_allclose(found, distances, atol=1e-4)
    assert Reading(force_unit="kcal/mol/Angstrom").force_factor == pytest.approx(
        0.0433641, rel=1e-5
    )


def test_structures_alone(tmp_path: Path, coll: Path) -> None:
    reading = Reading(labels="none", references="none")
    convert(Conversion((coll,), reading), tmp_path / "out", 1)
    sample = read(tmp_path / "out" / "val")[0]
    assert "energy" not in sample
    assert "forces" not in sample


def test_an_interrupted_conversion_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    held = write_oc20(source, 0, [(1, 2)], 0) + write_oc20(source, 1, [(2, 2)], 5)
    whole = (source / "1.extxyz.xz").read_bytes()
    (source / "1.extxyz.xz").write_bytes(whole[: len(whole) // 2])
    conversion = Conversion((source,), Reading(references="oc20", group="system"))
    dest = tmp_path / "out"
    with pytest.raises(UserError, match=r"1\.extxyz\.xz cannot be read"):
        convert(conversion, dest, 1)
    assert not dest.exists()
    first = tmp_path / ".out.converting" / "parts" / "000000" / "train.lmdb"
    made = first.stat().st_ino, first.stat().st_mtime_ns
    (source / "1.extxyz.xz").write_bytes(whole)
    convert(conversion, dest, 1)
    finished = (dest / "train" / "data.0000.lmdb").stat()
    assert (finished.st_ino, finished.st_mtime_ns) == made  # not made again
    assert [s.energy for s in read(dest / "train")] == pytest.approx([h[2] for h in held], abs=1e-6)
    with pytest.raises(UserError, match="exists; give --force"):
        convert(conversion, dest, 1)
    convert(conversion, dest, 1, force=True)


def test_a_converted_set_trains(tmp_path: Path, coll: Path) -> None:
    convert(Conversion((coll,), Reading(references="atomization")), tmp_path / "data", 1)
    arguments = config(tmp_path, tmp_path / "data", max_epochs=1, batch_size=6)
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == 2
        assert all(torch.isfinite(p).all() for p in built.model.parameters())


# -- refusals ---------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: object) -> str:
    """What the command says; nothing but a hidden folder may be left."""
    dest = tmp_path / "refused"
    assert main(["data", "convert", *map(str, argv), str(dest), "--processes", "1"]) == 2
    assert not dest.exists()
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert "Traceback" not in error
    return sentences[0]


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
    frames = molecules(2, 0)
    frames[0].cell, frames[0].pbc = [9.0, 9.0, 9.0], (True, True, False)
    assert "unlike periodic directions (TTF and TTT)" in say(frames)


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
        shown = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
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


def test_a_frame_without_atoms_is_left_out(tmp_path: Path) -> None:
    text = coll_text(molecules(3, 0))
    for name, empty in (("blank", "0\n\n"), ("named", "0\nProperties=species:S:1:pos:R:3\n")):
        (tmp_path / f"{name}.xyz").write_text(text + empty + text)
    reading = Reading(references="atomization")
    conversion = Conversion((tmp_path,), reading, into="train", max_skipped=0.2)
    card = convert(conversion, tmp_path.parent / f"{tmp_path.name}_out", 1)
    assert card["splits"]["train"]["frames"] == 12
    assert card["splits"]["train"]["skipped_frames"] == {"no atoms": 2}


def test_given_references(tmp_path: Path, coll: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "references.json"
    file.write_text(json.dumps(FREE_ATOMS))
    argv = ["data", "convert", str(coll), str(tmp_path / "out"), "--references", str(file)]
    assert main([*argv, "--processes", "1"]) == 0
    energies = [sample.energy for sample in read(tmp_path / "out" / "val")]
    expected = [atoms.get_potential_energy() for atoms in molecules(5, 1)]
    assert energies == pytest.approx(expected, abs=1e-6)
    file.write_text(json.dumps({"H": -13.6}))
    assert "has no energy for C, O, which the frames hold" in refused(
        capsys, tmp_path, coll, "--references", file
    )
    file.write_text("[]")
    assert "has to be auto, fit, none, or a JSON file" in refused(
        capsys, tmp_path, coll, "--references", file
    )
