"""``fairchem-kd teach --calculator``: stores of any ASE calculator, and trainings from them."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write
from configs import ROOT
from models import structures
from toy_calculators import Toy
from trainings import config, inside, trainer, weights, write_home, write_lmdb, write_yaml

from fairchem_kd.calculators import asking, filling
from fairchem_kd.commands.main import main
from fairchem_kd.store import Card, Reader
from fairchem_kd.store.failures import failures
from fairchem_kd.teachers.recorded import RecordedTeacher

EMT_WORDS = ["--calculator", "ase.calculators.emt:EMT"]
TOY_WORDS = ["--calculator", "toy_calculators:Toy"]
OUTPUTS = {"vanilla": {}, "per_atom_energy": {}}


def toy(**arguments: Any) -> list[str]:
    return [*TOY_WORDS, "--calculator-args", json.dumps(arguments)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with inside(folder):
        write_home({"train": 11, "val": 2})
        write_lmdb(Path("more"), 5, seed=90)
        bare = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc, tags=a.get_tags())
                for a in structures(5, seed=7, std=0.1)]  # fmt: skip
        write("slabs.extxyz", bare)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr("fairchem_kd.teachers.filling.GROUP", 3)
    monkeypatch.setattr("fairchem_kd.distillation.teaching.GROUP", 3)
    monkeypatch.setattr(filling, "_PROBED", 4)
    yield tmp_path / "home"
    logging.disable(logging.NOTSET)
    gc.collect()


def arguments(**distillation: Any) -> dict[str, Any]:
    block = {"teacher": {"store": "store"}, "losses": OUTPUTS, **distillation}
    return config(Path(), Path("data"), distillation=block)


def write_config(**distillation: Any) -> None:
    write_yaml(Path("config.yml"), arguments(**distillation))


def trained(given: dict[str, Any]) -> Any:
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


def records(store: str) -> dict[bytes, dict[str, np.ndarray]]:
    """Every record, by structure."""
    reader, found = Reader(store), {}
    for shard in reader.shards:
        for row, entry in enumerate(shard.entries):
            values = shard.values(row, shard.names)
            assert values is not None
            found[entry["key"].tobytes()] = values
    reader.close()
    return found


def test_a_training_learns_from_a_calculator_through_its_store_alone(
    home: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Labelled structures, unlabelled ones and pooled copies; EMT, whose labels the data has."""
    companions = {
        "rattle": {"copies": 1, "pool": 2},
        "unlabelled": {"dataset": {"format": "lmdb", "src": "more"}},
    }
    write_config(**companions)
    with caplog.at_level(logging.INFO):
        assert main(["teach", "config.yml", *EMT_WORDS]) == 0
    told = caplog.text
    assert "forces against finite differences of the energy, 4 structures: ratio 1.00" in told
    assert "The teacher on the labels: energy" in told
    out = capsys.readouterr().out
    assert "store: 48 structures" in out
    assert "teacher ase.calculators.emt:EMT" in out
    for values in records("store").values():
        assert values["output:forces"].shape == (len(values["numbers"]), 3)
        assert values["atom_energy"].sum() == pytest.approx(values["output:energy"][0])

    monkeypatch.setattr(EMT, "calculate", lambda *_: pytest.fail("a training asks nobody"))
    first = trained(arguments(**companions))
    again = trained(arguments(**companions))
    assert all((first[name] == again[name]).all() for name in first)
    plain = trained(config(Path(), Path("data"), losses=None))
    assert any((first[name] != plain[name]).any() for name in first)


def test_the_labels_of_a_set_are_what_its_own_calculator_says(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data's labels are EMT's: so are the store's answers, atom for atom."""
    assert main(["teach", "data/train", "more", *EMT_WORDS, "--out", "store"]) == 0
    assert "store: 16 structures" in capsys.readouterr().out
    given = arguments(losses={"vanilla": {}})
    with trainer(given) as built:
        built.set_up()
        stored = built.distillation.teacher
        batch = built.collater([built.train_dataset[i] for i in range(11)])
        said = stored.teach(batch, ())
        assert np.allclose(said.outputs["energy"].ravel(), batch.energy, atol=2e-4)
        assert np.allclose(said.outputs["forces"], batch.forces, atol=2e-4)
    assert main(["teach", "verify", "store", "--samples", "6"]) == 0
    out = capsys.readouterr().out
    assert "16 records are whole, 0 are damaged" in out
    assert "6 structures were asked about again" in out


def test_labels_of_files_that_ase_reads_tell_units_too(
    home: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Some of the structures have none."""
    found = list(read("slabs.extxyz", ":"))
    for atoms in found[::2]:
        atoms.calc = EMT()
        atoms.get_forces()
    write("labelled.extxyz", found)
    words = ["teach", "labelled.extxyz", "--out", "store"]
    assert main([*words, *toy(energy=23.061, forces=23.061)]) == 2
    assert "its forces are 23.1 times the labels', as in kcal/mol/Å" in capsys.readouterr().err
    assert not Path("store/store.json").exists()
    with caplog.at_level(logging.INFO):
        assert main([*words, *EMT_WORDS]) == 0
    assert re.search(r"The teacher on the labels: .* \(MAE of 2 structures\)", caplog.text)


def test_structures_with_and_without_labels_are_asked_about_together(home: Path) -> None:
    write_lmdb(Path("some"), 4, seed=20)
    file = lmdb.open("some/data.0000.lmdb", subdir=False, lock=False)
    with file.begin(write=True) as transaction:
        for number in (b"1", b"3"):
            sample = pickle.loads(transaction.get(number))
            del sample["energy"], sample["forces"]
            transaction.put(number, pickle.dumps(sample, protocol=4))
    file.close()
    assert main(["teach", "some", *EMT_WORDS, "--out", "store"]) == 0
    assert len(records("store")) == 4


def test_another_zero_is_told_by_element_and_taken_out(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lmdb(Path("many"), 24, seed=300)
    words = ["teach", "data/train", "many", *toy(shift=3.5), "--out", "store"]
    with caplog.at_level(logging.INFO):
        assert main(words) == 0
    assert re.search(r"Cu -3\.(5|499)", caplog.text)
    assert "task.distillation.teacher.energy_zero: labels" in caplog.text
    own = {"store": "store", "energy_zero": "labels"}
    given = arguments(teacher=own, losses={"vanilla": {}})
    given["dataset"]["train"]["src"] = "many"
    with trainer(given) as built:
        built.set_up()
        found = built.distillation.agreement(built.train_dataset, built.collater)
        assert found.energy < 1e-3
        assert found.forces < 1e-3


def test_features_of_a_calculator_teach(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(losses={"n2n": {}, "v2v": {"teacher": "vector"}})
    features = ["--features", "node", "vector=arrows"]
    assert main(["teach", "config.yml", *toy(with_features=True), "--out", "store"]) == 2
    error = capsys.readouterr().err
    assert "task.distillation.losses.n2n.teacher: the store store holds no feature 'node'" in error
    assert "--features ADDRESS=KEY" in error
    words = ["teach", "config.yml", *toy(with_features=True), *features]
    assert main(words) == 0
    assert "feature:vector:vector        (N, 3, 2) <f4: 11 structures" in capsys.readouterr().out
    assert len(trained(arguments(losses={"n2n": {}, "v2v": {"teacher": "vector"}})))
    # of structures that it lacks the store asks for the same, as the training's advice has it
    write_lmdb(Path("data/more"), 3, seed=90)
    assert main(["teach", "data/more", *words[2:-3], "--out", "store"]) == 0
    assert "feature:vector:vector        (N, 3, 2) <f4: 14 structures" in capsys.readouterr().out
    words[-1] = "vector=other"
    assert main(words) == 2
    assert "the store store has 'arrows' of the results under vector" in capsys.readouterr().err


def test_failures_are_passed_over_counted_named_and_asked_again(
    home: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_config()
    calculate, asked = Toy.calculate, []

    def failing(self: Toy, atoms: Any = None, *more: Any) -> None:
        asked.append(len(atoms))
        if len(atoms) == sizes[1]:
            raise RuntimeError("no convergence")
        calculate(self, atoms, *more)

    sizes = sorted({len(one) for one in structures(4, seed=0, std=0.15)})
    monkeypatch.setattr(Toy, "calculate", failing)
    with caplog.at_level(logging.INFO):
        assert main(["teach", "config.yml", *TOY_WORDS]) == 0
    failed = failures(Path("store"))
    assert 0 < len(failed) < 6
    assert f"{len(failed)} failed (named in failed.jsonl of the store)" in caplog.text
    assert f"{len(failed)} structures of which it could say nothing" in capsys.readouterr().out
    (line, *_) = failed.values()
    assert line["why"] == "RuntimeError: no convergence"
    assert line["structure"].startswith("structure ")
    assert "dataset.train (" in line["structure"]
    asked.clear()
    assert main(["teach", "config.yml", *TOY_WORDS]) == 0
    assert asked == []  # neither what is there nor what failed
    with trainer(arguments()) as built:
        built.train(disable_eval_tqdm=True)
        batch = built.collater([built.train_dataset[i] for i in range(11)])
        said = built.distillation.teacher.teach(batch, built.distillation.teacher_requests)
        untrusted = said.sound(["energy", "forces"]).trusted
        assert int((~untrusted).sum()) == len(failed)
    monkeypatch.setattr(Toy, "calculate", calculate)
    assert main(["teach", "config.yml", *TOY_WORDS, "--retry"]) == 0
    assert len(records("store")) == 11
    assert "nothing" not in capsys.readouterr().out.rpartition("store: 11")[2]


def test_a_stopped_filling_goes_on_where_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And parts are together what one process does."""
    write_config(rattle={"copies": 1, "pool": 2})
    assert main(["teach", "config.yml", *TOY_WORDS, "--out", "whole"]) == 0
    ask, asked = asking.Calculator.ask, []

    def stopping(self: Any, structure: Any) -> Any:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(structure.key())
        return ask(self, structure)

    monkeypatch.setattr(asking.Calculator, "ask", stopping)
    assert main(["teach", "config.yml", *TOY_WORDS, "--out", "parts"]) == 130
    assert len(records("parts")) == 7
    gc.collect()
    asked = [b""] * 8
    for part in ("2/2", "1/2"):
        assert main(["teach", "config.yml", *TOY_WORDS, "--out", "parts", "--part", part]) == 0
    left, right = records("whole"), records("parts")
    assert left.keys() == right.keys()
    assert len(asked) - 8 == len(left) - 7
    for key, values in left.items():
        assert all(np.array_equal(value, right[key][name]) for name, value in values.items())


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({}, ["config.yml", *toy(forces=-1.0)], "its forces are -1 times the labels'"),
        ({}, ["config.yml", *toy(energy=23.061, forces=23.061)], "times the labels', as in kcal"),
        ({}, ["slabs.extxyz", *toy(forces=3.0), "--out", "s"], "not the gradient of its energy"),
        ({}, ["config.yml", *toy(fails=-1)], "can say nothing of the first 4 structures"),
        ({}, ["config.yml", *TOY_WORDS, "--teacher", "teacher.pt"], "--teacher is of a checkpoint"),
        ({}, ["config.yml", *TOY_WORDS, "--precision", "bf16"], "--precision is of a checkpoint"),
        ({}, ["config.yml", "--retry"], "--retry goes with --calculator"),
        ({}, ["config.yml", "--calculator-args", "{}"], "--calculator-args goes with --calculator"),
        ({}, ["config.yml", *TOY_WORDS, "--out", "auto"], "--calculator needs --out STORE"),
        ({}, ["slabs.extxyz", *TOY_WORDS], "--calculator needs --out STORE"),
        ({}, ["config.yml", *TOY_WORDS, "--features", "head"], "of a calculator give ADDRESS"),
        ({}, ["config.yml", *TOY_WORDS, "--out", "data"], "--out: data is no store"),
        ({}, ["config.yml"], "there is nobody to ask"),
        ({"losses": {"n2n": {}}}, ["config.yml", *TOY_WORDS], "holds no feature 'node'"),
        ({"losses": None}, ["config.yml", *TOY_WORDS], "losses is empty"),
        ({"rattle": {"pool": None}}, ["config.yml", *TOY_WORDS], "rattle.pool is null"),
        (
            {"teacher": {"checkpoint": "teacher.pt"}},
            ["config.yml", *TOY_WORDS, "--out", "store"],
            "names a checkpoint in task.distillation.teacher",
        ),
        ({}, ["--writer", "a.txt"], "name a python file"),
        ({}, ["config.yml", "--structures", "a.xyz"], "NAME.npz"),
        ({}, [], "needs CONFIG.yml, or DATA"),
    ],
)
def test_what_cannot_work_is_refused(
    home: Path, given: dict[str, Any], words: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_config(**given)
    assert main(["teach", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("store/store.json").exists() or "feature" in message


def test_a_store_of_another_calculator_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teach", "slabs.extxyz", "--out", "store"]
    assert main([*words, *EMT_WORDS]) == 0
    for other in (TOY_WORDS, [*EMT_WORDS, "--teacher-name", "of mine"]):
        assert main([*words, *other]) == 2
        assert "store keeps what another teacher said" in capsys.readouterr().err
    card = Card.read(Path("store"))
    assert card is not None
    assert card.calculator is not None
    assert card.calculator["factory"] == "ase.calculators.emt:EMT"
    told = Path("store/store.json").read_text().replace('"ase": "', '"ase": "0.')
    Path("store/store.json").write_text(told.replace(card.teacher, "0" * 64))
    assert main(["teach", "verify", "store"]) == 2
    assert "install what it was, or fill another store" in capsys.readouterr().err


CLEAN = """
import sys
sys.path[:] = [p for p in sys.path if p not in ("", {root!r})]


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "fairchem", "fairchem_kd", "yaml", "tqdm"}}:
            raise ImportError(f"{{name}} is not here")


sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {helpers!r})
sys.argv = {words!r}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def elsewhere(*words: str) -> subprocess.CompletedProcess[str]:
    """The written file, where neither torch nor fairchem nor fairchem-kd can be imported."""
    helpers = str(ROOT / "tests/helpers")
    code = CLEAN.format(root=str(ROOT), helpers=helpers, words=["writer.py", *words])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip


def test_the_written_file_fills_the_same_store_without_us(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(rattle={"copies": 1, "pool": 2})
    assert main(["teach", "--writer", "writer.py"]) == 0
    assert main(["teach", "config.yml", "--structures", "wanted.npz"]) == 0
    assert "wrote 22 structures to wanted.npz" in capsys.readouterr().out
    gc.collect()
    done = elsewhere("wanted.npz", *toy(shift=1.0), "--out", "there", "--part", "1/2")
    assert done.returncode == 0, done.stderr
    done = elsewhere("wanted.npz", *toy(shift=1.0), "--out", "there")
    assert done.returncode == 0, done.stderr
    assert "11 structures asked about, 11 were there already" in done.stdout
    assert main(["teach", "config.yml", *toy(shift=1.0), "--out", "here"]) == 0
    here, there = records("here"), records("there")
    assert here.keys() == there.keys()
    for key, values in here.items():
        assert all(np.array_equal(value, there[key][name]) for name, value in values.items())
    one, other = Card.read(Path("here")), Card.read(Path("there"))
    assert one is not None
    assert one == other
    assert RecordedTeacher(Path("there")).digest == one.teacher
    trained(arguments(teacher={"store": "there"}, rattle={"copies": 1, "pool": 2}))


def test_the_written_file_reads_what_ase_reads_as_we_do(home: Path) -> None:
    assert main(["teach", "--writer", "writer.py"]) == 0
    done = elsewhere("slabs.extxyz", *EMT_WORDS, "--out", "there")
    assert done.returncode == 0, done.stderr
    assert main(["teach", "slabs.extxyz", *EMT_WORDS, "--out", "here"]) == 0
    assert records("here").keys() == records("there").keys()
    for bad, message in (
        ("gone.extxyz", "gone.extxyz is no file"),
        ("writer.py", "cannot be read by ASE"),
    ):
        done = elsewhere(bad, *EMT_WORDS, "--out", "other")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    found = list(read("slabs.extxyz", ":"))
    energies = sorted(float(v["output:energy"][0]) for v in records("there").values())
    for atoms in found:
        atoms.calc = EMT()
    assert np.allclose(energies, sorted(a.get_potential_energy() for a in found), atol=1e-4)


@pytest.mark.slow
def test_processes_fill_one_store(home: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}
    code = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
    words = ["teach", "slabs.extxyz", *TOY_WORDS, "--out", "store", "--processes", "2"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, env=environment)
    assert len(records("store")) == 4
    assert len(list(Path("store/shards").glob("*.index"))) >= 2
