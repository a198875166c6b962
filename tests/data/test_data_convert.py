"""Published files to fairchem's LMDB: what is written, and that it trains."""

from __future__ import annotations

import json
from pathlib import Path

import ase
import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from models import structures
from published import FREE_ATOMS, coll_text, molecules, read, refused, with_labels, write_oc20
from published import coll as coll
from trainings import config, trainer

from fairchem_kd.commands.main import main
from fairchem_kd.data.card import read_card
from fairchem_kd.data.convert import sources
from fairchem_kd.data.convert.assemble import Conversion
from fairchem_kd.data.convert.conversion import convert, split_for
from fairchem_kd.data.convert.labels import Reading
from fairchem_kd.errors import UserError
from fairchem_kd.stock.samples import collate

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


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


def test_slabs_and_molecules_together(tmp_path: Path) -> None:
    """One periodicity for all, and the neighbours that each of them had."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.info.clear()
    slab.rattle(0.05, seed=1)
    wire = ase.Atoms("AuAg", [[0, 0, 0], [2.6, 0.3, 0]], cell=[5.3, 0, 0], pbc=[True, False, False])
    source = [slab, molecule("CH3OH"), wire, bulk("Cu", cubic=True), molecule("H2O")]
    for atoms in source:
        results = {"energy": -1.0, "forces": np.zeros((len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **results)
    ase.io.write(tmp_path / "all.xyz", source, format="extxyz")
    reading = Reading(references="none")
    card = convert(Conversion((tmp_path / "all.xyz",), reading), tmp_path / "all", 1)
    assert any("unlike periodic directions (TFF and TTF and TTT)" in n for n in card["notes"])
    samples = read(tmp_path / "all" / "train")
    for sample, atoms in zip(samples, source, strict=True):
        assert sample.pbc.tolist() == [[True] * 3]
        made = ase.Atoms(sample.atomic_numbers.numpy(), sample.pos, cell=sample.cell[0], pbc=True)
        np.testing.assert_allclose(
            np.sort(neighbor_list("d", made, 6.0)), np.sort(neighbor_list("d", atoms, 6.0)),
            atol=1e-5,
        )  # fmt: skip
    whole = collate(samples, otf_graph=True)
    assert torch.equal(whole.cell, torch.cat([sample.cell for sample in samples]))


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
