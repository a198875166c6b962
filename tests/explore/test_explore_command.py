"""``fairchem-kd explore``: whole explorations, through the command."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT as Emt
from ase.io import write
from commands import PATIENCE_S, wait_until
from explorations import FAST, samples
from models import structures
from trainings import PRELOAD, config, inside, trainer, write_home, write_lmdb

from fairchem_kd.commands import explore as command
from fairchem_kd.commands.explore_options import MODES
from fairchem_kd.commands.main import main
from fairchem_kd.data.metadata import check_metadata
from fairchem_kd.explore import exploration, settings
from fairchem_kd.explore.starts import Source, find_sources
from fairchem_kd.npz import read_array
from fairchem_kd.stock.datasets import collate
from fairchem_kd.store import Reader
from fairchem_kd.teachers.answers import structures_of
from fairchem_kd.teachers.recorded import RecordedTeacher

EMT = ["--calculator", "ase.calculators.emt:EMT"]
MD = ["--mode", "md", *EMT, "--steps", "6", "--every", "3", *FAST]
TRAIN, TEST = 6, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/train and data/test, whose first structure train has too, and teacher.pt."""
    folder = tmp_path_factory.mktemp("explore")
    with inside(folder):
        write_home({"train": TRAIN, "val": 2}, model="painn")
        write_lmdb(Path("data/test"), TEST, seed=60, sid=lambda sid, _: sid + 1000)
        bare = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc, tags=a.get_tags())
                for a in structures(3, seed=7, std=0.1)]  # fmt: skip
        write("slabs_test.extxyz", bare)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    yield tmp_path / "home"
    logging.disable(logging.NOTSET)
    gc.collect()


def contents(split: str) -> list[tuple[Any, ...]]:
    """All that samples hold, as plain values."""
    return [
        tuple(
            (key, value.numpy().tobytes() if hasattr(value, "numpy") else value)
            for key, value in sorted(one.to_dict().items())
        )
        for one in samples(split)
    ]


def test_the_commands_modes_are_those_of_explorations() -> None:
    assert settings.MODES == MODES


def test_copies_are_a_data_set_in_the_split_and_of_the_trajectory_of_what_they_came_of(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "data", "--out", "new", "--copies", "3"]) == 0
    out = capsys.readouterr().out
    assert "18 frames" in out
    assert "unlabelled: {dataset: {format: lmdb, src: new/train}}" in out
    assert sorted(path.name for path in Path("new").iterdir()) == ["card.json", "train"]
    sources, found = samples("data/train"), samples("new/train")
    assert len(found) == 18
    for number, one in enumerate(found):
        source = sources[number // 3]
        assert (one.sid, one.fid) == (source.sid, number % 3)
        assert (one.atomic_numbers == source.atomic_numbers).all()
        assert (one.tags == source.tags).all()
        assert (one.fixed == source.fixed).all()
        assert (one.cell == source.cell).all()
        assert (one.pos[source.fixed == 1] == source.pos[source.fixed == 1]).all()
        assert (one.pos[source.fixed == 0] != source.pos[source.fixed == 0]).any()
        assert "energy" not in one
        assert "forces" not in one
    check_metadata(Path("new/train/metadata.npz"), "here", 18)
    assert read_array("new/train/metadata.npz", "value").tolist() == [0.03, 0.06, 0.12] * 6
    card = json.loads(Path("new/card.json").read_text())
    assert card["exploration"]["kinds"] == {"rattled": 18}
    assert card["splits"]["train"]["trajectories"] == 6
    given = config(Path(), Path("data"), teacher=Path("teacher.pt"), distillation={
        "unlabelled": {"dataset": {"format": "lmdb", "src": "new/train"}}})  # fmt: skip
    given["task"]["distillation"]["losses"] = {"vanilla": {}}
    given["task"]["distillation"]["teacher"] = {"checkpoint": "teacher.pt"}
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)


def test_a_calculators_dynamics_are_a_labelled_set_and_its_store_is_filled(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explore", "data", "--out", "new", *MD, "--store", "store", "--alike", "0"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Looked at forces against finite differences of the energy" in out
    assert "normalizer" in out
    found = samples("new/train")
    told = json.loads(Path("new/card.json").read_text())["exploration"]
    ended = sum(told["left_out"].values())  # light atoms, of which a long step is too long
    assert told["kept"] == len(found) >= 12 - 2 * ended > 6
    for one in found:
        atoms = Atoms(one.atomic_numbers.numpy(), one.pos.numpy().astype(float),
                      cell=one.cell[0].numpy(), pbc=True)  # fmt: skip
        atoms.calc = Emt()
        assert one.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        np.testing.assert_allclose(one.forces, atoms.get_forces(), atol=1e-4)
    reader = Reader(Path("store"))
    assert sum(len(shard.entries) for shard in reader.shards) == len(found)
    reader.close()
    assert main(words) == 0  # it is there, and so is what the calculator said
    assert f"{len(found)} frames" in capsys.readouterr().out


@pytest.mark.parametrize("height", [9.0, 0.0])
def test_a_slab_that_is_not_periodic_along_its_normal_has_no_images_there(
    home: Path, height: float
) -> None:
    """Neither on the way nor in its labels, which are what its store has."""
    edit = {"cell": lambda cell, _: cell * torch.tensor([1, 1, 0]) + height * torch.tensor(
        [[0, 0, 0], [0, 0, 0], [0, 0, 1.0]])}  # fmt: skip
    pbc = {"pbc": lambda pbc, _: pbc & torch.tensor([[True, True, False]])}
    write_lmdb(Path("thin"), 2, seed=60, **edit, **pbc)
    assert main(["explore", "thin", "--out", "new", *MD, "--store", "store"]) == 0
    found = samples("new/thin")
    assert len(found) > 1
    reader = Reader(Path("store"))
    for one in found:
        assert one.pbc.tolist() == [[True, True, False]]
        atoms = Atoms(one.atomic_numbers.numpy(), one.pos.numpy().astype(float),
                      cell=one.cell[0].numpy(), pbc=one.pbc[0].numpy())  # fmt: skip
        atoms.calc = Emt()
        expected = atoms.get_potential_energy()
        assert one.energy == pytest.approx(expected, abs=1e-4)
        (structure,) = structures_of(collate([one]))
        said = reader.read(structure.key(), ["output:energy"])
        assert said is not None
        assert float(said["output:energy"][0]) == pytest.approx(expected, abs=1e-4)
    reader.close()


COUNTING = """
from ase.calculators.emt import EMT


class Counting(EMT):
    def calculate(self, atoms=None, *more, **options):
        super().calculate(atoms, *more, **options)
        self.results["node_features"] = atoms.positions[:, :2] + 0.1
        with open("asked.txt", "a") as file:
            file.write(atoms.positions.tobytes().hex() + "\\n")
"""


@pytest.mark.parametrize("mode", [MD[:2] + MD[4:], ["--mode", "relax", "--temperature", "9000"]])
def test_a_calculator_is_asked_once_about_a_frame_though_all_that_it_says_is_kept(
    home: Path, mode: list[str]
) -> None:
    Path("counting.py").write_text(COUNTING)
    words = ["explore", "data", *mode, "--calculator", "counting:Counting", "--features", "node"]
    assert main([*words, "--out", "first", "--store", "store", "--seed", "5"]) == 0  # looks at it
    Path("asked.txt").unlink()
    assert main([*words, "--out", "bad", "--store", "data"]) == 2  # no store, once all is found
    assert not Path("bad").exists()
    assert main([*words, "--out", "bad", "--store", "store"]) == 0  # goes on with what was found
    asked = Path("asked.txt").read_text().splitlines()
    found = samples("bad/train")
    assert len(found) > 6
    teacher = RecordedTeacher(Path("store"))
    columns = teacher.columns(sorted(teacher.features))
    reader = Reader("store")
    for one in found:
        (structure,) = structures_of(collate([one]))
        at = structure.pos.astype(float)
        assert asked.count(at.tobytes().hex()) == 1
        said = reader.read(structure.key(), [column.name for column in columns])
        atoms = Atoms(structure.numbers, at, cell=structure.cell.astype(float), pbc=True)
        atoms.calc = Emt()
        assert said is not None
        np.testing.assert_array_equal(said["output:forces"], atoms.get_forces())
        assert float(said["output:energy"][0]) == atoms.get_potential_energy()
        (features,) = (value for name, value in said.items() if name.startswith("feature:node"))
        np.testing.assert_allclose(features, at[:, :2] + 0.1, rtol=1e-6)
    reader.close()


def test_a_checkpoints_modes_fill_the_store_of_trainings(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--teacher", "teacher.pt", "--cpu", "--limit", "4"]
    assert main(["explore", "data", "--out", "relaxed", "--mode", "relax", *common,
                 "--copies", "2", "--temperature", "3000", "--store", "store"]) == 0  # fmt: skip
    relaxed = samples("relaxed/train")
    assert {one.sid for one in relaxed} <= {one.sid for one in samples("data/train")}
    reader = Reader(Path("store"))
    assert sum(len(shard.entries) for shard in reader.shards) == len(relaxed) > 0
    reader.close()
    capsys.readouterr()
    shutil.copy("teacher.pt", "student.pt")
    words = ["explore", "data", "--mode", "student", "--student", "student.pt", *common,
             "--steps", "4", "--every", "2", "--store", "off", *FAST]  # fmt: skip
    # of a student that is its teacher the window is empty
    assert main([*words, "--out", "none", "--window", "0.001", "1"]) == 2
    error = capsys.readouterr().err
    assert "The window of 0.001 to 1 eV/Å is empty: in 8 frames" in error
    assert not list(Path().glob(".none.exploring"))
    assert main([*words, "--out", "all", "--window", "0", "1"]) == 0
    out = capsys.readouterr().out
    assert "of 8 frames of the student's dynamics 8 are inside, 0 below, 0 beyond; 0 crashes" in out
    assert read_array("all/train/metadata.npz", "kind").tolist() == ["student"] * 8


def test_nothing_of_a_test_gets_into_train(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by its trajectory, nor by a structure that is in both, turned or not."""
    assert main(["explore", "data", "--out", "new", "--splits", "train", "test"]) == 0
    capsys.readouterr()
    train, test = samples("new/train"), samples("new/test")
    own = {one.sid for one in samples("data/train")}, {one.sid for one in samples("data/test")}
    assert {one.sid for one in train} == own[0]
    assert {one.sid for one in test} == own[1]
    assert not own[0] & own[1]
    # A structure of the test whose copies are, for all that can be told, itself.
    shutil.rmtree("data/test")
    shutil.copytree("new/train", "data/test")
    assert main(["explore", "data", "--out", "again", "--copies", "5"]) == 0
    out = capsys.readouterr().out
    assert f"{4 * TRAIN} there in a split for validation or tests" in out
    assert len(samples("again/train")) == TRAIN


def test_a_file_that_ase_reads_is_of_the_split_that_its_name_says(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "slabs_test.extxyz", "--out", "new", "--copies", "2"]) == 0
    assert "not to be trained on: new/test" in capsys.readouterr().out
    assert len(samples("new/test")) == 6
    assert [one.sid for one in samples("new/test")] == [0, 0, 1, 1, 2, 2]


def test_of_a_folder_of_files_train_is_taken_and_the_others_are_kept_apart_from(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = structures(4, seed=7, std=0.1)[:2]
    bare = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in (one, other)]
    for folder, names in (("flat", ("train", "test")), ("deep", ("train/a", "test/a"))):
        for name in names:
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        write(f"{folder}/{names[0]}.extxyz", bare[:1] * 2)
        write(f"{folder}/{names[1]}.extxyz", bare[1])
        new = f"new_{folder}"
        assert main(["explore", folder, "--out", new, "--copies", "2"]) == 0
        assert f"src: {new}/train}}" in capsys.readouterr().out
        assert [path.name for path in Path(new).iterdir() if path.is_dir()] == ["train"]
        assert len(samples(f"{new}/train")) == 2
        found = exploration.beside(find_sources([Path(folder)], None))
        assert [(one.path, one.split) for one in found] == [
            (Path(folder, f"{names[1]}.extxyz").absolute(), "test")
        ]
    assert main(["explore", "flat", "--out", "both", "--splits", "train", "test"]) == 0
    assert len(samples("both/test")) == 4
    Path("flat/train.extxyz").rename("flat/val.extxyz")
    assert main(["explore", "flat", "--out", "none"]) == 2
    assert "or of train without it" in capsys.readouterr().err


def test_the_normalizer_is_that_of_train(home: Path) -> None:
    for name, splits in (("one", ["train"]), ("both", ["val", "train"])):
        assert main(["explore", "data", "--out", name, "--splits", *splits, *EMT]) == 0
    one, both = (json.loads(Path(name, "card.json").read_text()) for name in ("one", "both"))
    assert list(both["splits"]) == ["val", "train"]
    assert both["normalizer"] == one["normalizer"]


def test_with_a_limit_frames_still_name_the_place_of_what_they_came_of(home: Path) -> None:
    assert main(["explore", "data", "--out", "new", "--limit", "2", "--copies", "1"]) == 0
    assert read_array("new/train/metadata.npz", "source").tolist() == [0, TRAIN // 2]
    assert [one.sid for one in samples("new/train")] == [0, TRAIN // 2]


def test_trajectories_of_several_sources_are_not_taken_for_one(home: Path) -> None:
    """Each file counts its structures from 0, and a data set may have names."""
    write_lmdb(Path("named/train"), 2, seed=3, sid=lambda sid, _: f"random{sid}")
    shutil.copy("slabs_test.extxyz", "more.extxyz")
    words = ["--out", "new", "--copies", "2"]
    assert main(["explore", "data", "named", "more.extxyz", *words]) == 0
    count = TRAIN + 5
    assert json.loads(Path("new/card.json").read_text())["splits"]["train"]["trajectories"] == count
    assert [one.sid for one in samples("new/train")] == [n for n in range(count) for _ in range(2)]
    files = ["data/train"] * TRAIN + ["named/train"] * 2 + ["more.extxyz"] * 3
    assert read_array("new/train/metadata.npz", "data")[::2].tolist() == files
    places = [*range(TRAIN), 0, 1, 0, 1, 2]
    assert read_array("new/train/metadata.npz", "source")[::2].tolist() == places


def test_trajectories_may_have_names(home: Path) -> None:
    write_lmdb(Path("named"), 2, seed=3, sid=lambda sid, _: f"random{sid}")
    assert main(["explore", "named", "--out", "new", "--copies", "2"]) == 0
    names = ["random0", "random0", "random1", "random1"]
    assert [one.sid for one in samples("new/named")] == names
    assert read_array("new/named/metadata.npz", "sid").tolist() == names
    check_metadata(Path("new/named/metadata.npz"), "here", 4)


def test_what_was_found_before_is_not_taken_again(home: Path) -> None:
    plan = exploration.Plan(find_sources([Path("data")], None), settings.Settings(copies=2))
    assert exploration.explore(plan, Path("one"))["exploration"]["kept"] == 2 * TRAIN
    more = replace(
        plan, settings=settings.Settings(copies=3), known=[Source(Path("one/train"), "")]
    )
    told = exploration.explore(more, Path("two"))["exploration"]
    assert (told["kept"], told["left_out"]["there already"]) == (TRAIN, 2 * TRAIN)


def test_frames_are_as_many_as_asked_for_and_from_all_over(home: Path) -> None:
    assert main(["explore", "data", "--out", "new", "--copies", "8", "--frames", "6"]) == 0
    assert [one.sid for one in samples("new/train")] == list(range(6))


def test_parts_make_what_one_process_makes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "data", "--out", "one", *MD]) == 0
    words: list[str] = []
    monkeypatch.setattr(command, "run_parts", lambda argv, parts: words.extend(argv[3:]))
    done: list[int] = []
    make = exploration._make
    monkeypatch.setattr(
        exploration, "_make", lambda *args: (done.append(args[0][0].place), make(*args))[1]
    )
    assert main(["explore", "data", "--out", "two", *MD, "--part", "2/2"]) == 0
    assert done == [1, 3, 5]
    assert main(["explore", "data", "--out", "two", *MD, "--processes", "2"]) == 0
    assert done == [1, 3, 5, 0, 2, 4]
    assert contents("one/train") == contents("two/train")
    assert words[:2] == ["explore", "data"]
    assert command_of(words)["mode"] == "md"
    assert command_of(words)["steps"] == 6


@pytest.mark.slow
def test_two_processes_make_what_one_makes(home: Path) -> None:
    assert main(["explore", "data", "--out", "one", *MD]) == 0
    assert main(["explore", "data", "--out", "two", *MD, "--processes", "2"]) == 0
    assert contents("one/train") == contents("two/train")


def command_of(words: list[str]) -> dict[str, Any]:
    """What a command would be told."""
    from fairchem_kd.commands.arguments import Parser

    parser = Parser()
    command.add_arguments(parser)
    return vars(parser.parse_args([*words[1:], "--part", "1/2"]))


def _explore(cwd: Path, argv: list[str]) -> None:
    os.setsid()
    os.chdir(cwd)
    make, calls = exploration._make, itertools.count(1)

    def no_further(*args: Any) -> Any:
        if next(calls) > TRAIN // 2:
            time.sleep(PATIENCE_S)  # killed meanwhile, however late
        return make(*args)

    exploration._make = no_further
    main(argv)


def test_one_that_was_killed_ends_as_it_would_have(home: Path) -> None:
    assert main(["explore", "data", "--out", "whole", *MD]) == 0
    multiprocessing.set_forkserver_preload(PRELOAD)
    context = multiprocessing.get_context("forkserver")
    argv = ["explore", "data", "--out", "cut", *MD]
    process: ForkServerProcess = context.Process(target=_explore, args=(home, argv))
    process.start()
    done = Path(".cut.exploring/groups")
    wait_until(lambda: len(list(done.glob("*.npz"))) >= 2, "the second group")
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    there = {file: file.stat().st_mtime_ns for file in done.glob("[0-9]*.npz")}
    assert len(there) < TRAIN
    first = min(there)
    first.write_bytes(first.read_bytes()[:100])  # and one is damaged
    made_anew: list[int] = []
    make = exploration._make
    exploration._make = lambda *args: (made_anew.append(args[0][0].place), make(*args))[1]
    try:
        assert main(argv) == 0
    finally:
        exploration._make = make
    assert len(made_anew) == TRAIN - len(there) + 1
    assert contents("cut/train") == contents("whole/train")
    assert not Path(".cut.exploring").exists()


def test_other_options_begin_anew_and_an_other_set_is_not_replaced(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "data", "--out", "new", *MD, "--part", "1/2"]) == 0
    assert main(["explore", "data", "--out", "new", *MD, "--seed", "1"]) == 0
    assert "begun anew" in capsys.readouterr().err
    assert main(["explore", "data", "--out", "new", *MD]) == 2
    assert "new exists; give --force" in capsys.readouterr().err
    before = contents("new/train")
    assert main(["explore", "data", "--out", "new", *MD, "--force"]) == 0
    assert contents("new/train") != before


TOY = ["--calculator", "toy_calculators:Toy", "--calculator-args"]


def test_a_folder_above_data_sets_is_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("above").mkdir()
    Path("data").rename("above/data")
    assert main(["explore", "above", "--out", "new"]) == 2
    error = capsys.readouterr().err
    assert "The folder above has no *.lmdb file and no file that ASE is known to read" in error
    assert "--pattern" not in error  # which is of `data convert`


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*MD[:2]], "--mode md needs a teacher"),
        (["--mode", "md", "--calculator", "toy_calculators:WithoutForces"], "gives no forces"),
        (["--mode", "md", *TOY, '{"forces": -1}'], "its forces point uphill"),
        (["--mode", "md", *TOY, '{"fails": -1}'], "did not converge"),
        ([*MD, "--every", "7"], "no frame would be taken"),
        ([*MD, "--std", "0.1"], "--std is of --mode rattle and relax, and this is md"),
        (["--window", "1", "2"], "--window is of --mode student"),
        (["--student", "teacher.pt"], "--student FILE and --mode student go together"),
        (["--mode", "student", "--teacher", "teacher.pt"], "go together"),
        (["--mode", "student", "--teacher", "teacher.pt", "--student", "teacher.pt",
          "--window", "2", "1"], "--window 2 1 is empty"),
        (["--teacher", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--teacher", "teacher.pt", *EMT], "are two teachers"),
        (["--store", "here"], "and none is given"),
        ([*MD, "--features", "node"], "--store must name the folder"),
        ([*MD, "--temperature", "1", "2", "3"], "takes one value"),
        (["--splits", "trian"], "has no split trian (did you mean 'train'?)"),
        (["--part", "3/2"], "must read I/N"),
        (["--std", "nan"], "must be more than 0, not nan"),
        (["--std", "5", "--max-gap", "0.1", "--min-distance", "3"], "No structure is left"),
        (["--out", "data"], "holds the source"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence(
    home: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = [] if "--out" in words else ["--out", "new"]
    try:
        code = main(["explore", "data", *out, *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"pos": lambda pos, index: pos * (np.nan if index == 2 else 1)},
            "positions that are not finite",
        ),
        ({"atomic_numbers": lambda z, _: z * 0 + 110}, "which teacher.pt does not know"),
        ({"cell": lambda cell, _: cell[:, [0, 0, 2]]}, "Structure 0 of bad is periodic along"),
    ],
)
def test_structures_that_will_not_do_are_named(
    home: Path, capsys: pytest.CaptureFixture[str], edit: dict[str, Any], message: str
) -> None:
    write_lmdb(Path("bad"), 3, seed=1, **edit)
    words = ["--mode", "relax", "--teacher", "teacher.pt", "--cpu"]
    assert main(["explore", "bad", "--out", "new", *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["explore", "nowhere", "--out", "new"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_folder_that_is_in_the_way_is_left_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".new.exploring").mkdir()
    Path(".new.exploring/mine").touch()
    assert main(["explore", "data", "--out", "new"]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert Path(".new.exploring/mine").exists()
