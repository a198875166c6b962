"""The ``build`` key, what it refuses, and what is left when a build is killed."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from commands import Command, wait_until

from fairchem_kd._version import __version__
from fairchem_kd.commands.main import main
from fairchem_kd.data.build import check_dataset, ensure_built
from fairchem_kd.data.card import read_card
from fairchem_kd.data.create import create
from fairchem_kd.data.frames import Trajectory
from fairchem_kd.data.recipes.registry import SLABS, Options, Recipe, parse_options
from fairchem_kd.data.splits import collect, quarter_lengths
from fairchem_kd.errors import UserError

TINY = {"recipe": "slabs", "train": 20, "val": 1, "test": 1, "test_ood": 1}


def config(root: Path, **build: Any) -> dict[str, Any]:
    options = {**TINY, **build}
    return {
        "dataset": {
            split: {"format": "lmdb", "src": str(root / split), "build": options}
            for split in ("train", "val", "test")
        }
    }


def builder(root: Path, **build: Any) -> Command:
    """Another process that asks for the data set; its log stands beside it."""
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from fairchem_kd.data.build import ensure_built\n"
        f"ensure_built({config(root, **build)!r})"
    )
    log = root.parent.parent / f"{root.parent.name}.{next(_NUMBERS)}.log"
    return Command([script], root.parent, log, of="python")


_NUMBERS = itertools.count()


def lmdb_file(path: Path, samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=2**20)
    with environment.begin(write=True) as transaction:
        for number in range(samples):
            transaction.put(str(number).encode(), b"sample")
        transaction.put(b"length", pickle.dumps(samples))
    environment.close()


def refusal(dataset: Any) -> str:
    with pytest.raises(UserError) as caught:
        ensure_built({"dataset": dataset})
    return str(caught.value)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build") / "data" / "slabs"
    ensure_built(config(root))
    return root


# -- building --------------------------------------------------------------------------------------


def test_a_missing_data_set_is_built_whole_and_only_once(built: Path) -> None:
    folders = {path.name for path in built.iterdir() if path.is_dir()}
    assert folders == {
        "train", "train_1of4", "train_2of4", "train_3of4", "val", "test", "test_ood",
    }  # fmt: skip
    assert [path.name for path in built.parent.iterdir() if path != built] == [".slabs.lock"]
    # Others may read it: the mode is that of any new folder.
    (built.parent / "new").mkdir()
    assert built.stat().st_mode == (built.parent / "new").stat().st_mode
    (built.parent / "new").rmdir()
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    ensure_built(config(built))
    quarter = config(built)["dataset"]
    quarter["train"]["src"] = str(built / "train_1of4") + "/"
    ensure_built({"dataset": quarter})
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_two_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    root = tmp_path / "slabs"
    builders = [builder(root), builder(root)]
    for process in builders:
        process.finish()
    said = [process.log.read_text() for process in builders]
    assert sorted(text.count("slabs train: 20/20") for text in said) == [0, 1], said
    assert read_card(root) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"slabs", ".slabs.lock"}


def test_a_killed_build_leaves_no_data_set_no_workers_and_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "slabs"
    process = builder(root, train=5000)
    try:
        wait_until(lambda: list(tmp_path.glob(".slabs.building-*")), "the build's start")
        time.sleep(0.5)
    finally:
        os.kill(process.pid, signal.SIGKILL)  # it alone
        process.wait()
    assert not root.exists()
    # Its session held nothing but the builder and its workers: they end by themselves.
    wait_until(lambda: not _session_alive(process.pid), "the end of the workers")
    ensure_built(config(root))
    assert {path.name for path in tmp_path.iterdir()} == {"slabs", ".slabs.lock"}


def _session_alive(session: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def test_an_interrupted_build_tidies_up(tmp_path: Path) -> None:
    process = builder(tmp_path / "slabs", train=5000)
    try:
        wait_until(lambda: list(tmp_path.glob(".slabs.building-*")), "the build's start")
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGINT)
        process.wait()
    finally:
        process.kill()
    assert {path.name for path in tmp_path.iterdir()} == {".slabs.lock"}


def _die(seed: int, split: int, index: int) -> Trajectory:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _give_nothing(seed: int, split: int, index: int) -> Trajectory:
    return Trajectory({}, [], Counter({"nothing": 1}))


def _recipe(make: Any) -> Options:
    recipe = Recipe("slabs", SLABS.sizes, lambda split: make, 5, 20, "none", "none", ())
    return Options(recipe, 0, {"train": 20, "val": 1, "test": 1, "test_ood": 1})


def test_a_worker_killed_for_memory_ends_the_build_and_keeps_the_old_data(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    with pytest.raises(UserError, match="a worker process was killed"):
        create(_recipe(_die), built, 2, force=True)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert {path.name for path in built.parent.iterdir()} == {"slabs", ".slabs.lock"}


def test_a_recipe_that_gives_no_frames_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"only 0 of 20 frames after 1400 trajectories"):
        create(_recipe(_give_nothing), tmp_path / "slabs", 1)
    assert {path.name for path in tmp_path.iterdir()} == {".slabs.lock"}


def test_fairchem_is_not_imported() -> None:
    code = "import sys, fairchem_kd.data.build; assert 'fairchem.core' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# -- splits ----------------------------------------------------------------------------------------


def test_collect_cuts_the_last_trajectory_and_counts_what_was_skipped() -> None:
    frames: list[Any] = [object() for _ in range(4)]
    stream = (Trajectory({}, frames[: n % 5], Counter(late=1)) for n in itertools.count())
    split = collect("val", 12, 100, stream)
    assert split.sids == [101, 102, 102, 103, 103, 103, 104, 104, 104, 104, 106, 107]
    assert split.fids == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert split.tried == 8
    assert split.skipped == {"late": 8}


def test_quarters_end_with_a_trajectory() -> None:
    assert quarter_lengths([0, 0, 0, 1, 1, 2, 2, 3]) == {1: 3, 2: 5, 3: 7}
    assert quarter_lengths([0, 1, 2, 3]) == {1: 1, 2: 2, 3: 3}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        ("slabs", r"dataset.train.build is 'slabs', but must be a mapping"),
        ({"seed": 1}, r"dataset.train.build has no recipe; give one of: collisions, slabs"),
        ({"recipe": "slab"}, r"build.recipe: unknown 'slab' \(did you mean 'slabs'\?\)"),
        ({**TINY, "sed": 0}, r"dataset.train.build: unknown key 'sed' \(did you mean 'seed'\?\)"),
        ({**TINY, "seed": -1}, r"build.seed is -1, but must be a whole number of at least 0"),
        ({**TINY, "seed": True}, r"build.seed is True, but must be a whole number"),
        ({**TINY, "val": "many"}, r"build.val is 'many', but must be a whole number of at least 1"),
        ({**TINY, "train": 19}, r"build.train is 19, but must be a whole number of at least 20"),
        ({**TINY, "val": 1.5}, r"build.val is 1.5, but must be a whole number"),
        ({"recipe": "collisions", "tests": 5}, r"unknown key 'tests'"),
    ],
)
def test_a_wrong_build_is_refused(tmp_path: Path, build: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ensure_built({"dataset": {"train": {"src": str(tmp_path / "d/train"), "build": build}}})
    assert not list(tmp_path.iterdir())


def test_numbers_from_the_command_line_are_strings() -> None:
    options = parse_options({"recipe": "slabs", "seed": "3", "train": "40"}, "build")
    assert options.as_dict() == {
        "recipe": "slabs", "seed": 3, "train": 40, "val": 500, "test": 500, "test_ood": 500,
    }  # fmt: skip


def test_a_folder_that_is_no_split_of_the_recipe_is_refused(tmp_path: Path, built: Path) -> None:
    text = refusal({"train": {"src": str(tmp_path / "slabs/trian"), "build": TINY}})
    assert "dataset.train.src" in text
    assert "did you mean 'train'?" in text
    assert not list(tmp_path.iterdir())
    text = refusal({"train": {"src": [str(built / "train")], "build": TINY}})
    assert "with build it must be one folder" in text


def test_data_built_with_other_options_are_refused(built: Path) -> None:
    text = refusal(config(built, seed=4, val=2)["dataset"])
    assert "seed 0 instead of 4, val 1 instead of 2" in text
    assert text.startswith("dataset.train.build: the data set")
    assert "remove it so that it is built again" in text


def energies(folder: Path) -> list[float]:
    """Labels of a split, in eV."""
    environment = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, lock=False, readonly=True)
    with environment.begin() as transaction:
        count = pickle.loads(transaction.get(b"length"))
        found = [float(pickle.loads(transaction.get(str(i).encode())).energy) for i in range(count)]
    environment.close()
    return found


def test_sets_of_two_sizes_with_one_zero(tmp_path: Path, built: Path) -> None:
    """The first frames have the same labels, as they have not where each set has its own fit."""
    large, same = tmp_path / "large", tmp_path / "same"
    card = create(parse_options({**TINY, "train": 60}, "build"), large, processes=1)
    options = {**TINY, "references": str(large)}
    told = create(parse_options(options, "build"), same, processes=1)
    assert told["reference_energies"] == card["reference_energies"]
    assert told["reference_method"] == f"those of {large}, eV per atom"
    for split in ("train", "test"):
        first = energies(same / split)
        assert energies(large / split)[: len(first)] == pytest.approx(first, abs=1e-6)
    own = read_card(built)
    assert own is not None
    assert own["reference_energies"] != card["reference_energies"]
    assert energies(built / "train") != pytest.approx(energies(same / "train"), abs=1e-3)
    # it is another data set to whoever asks for it without
    assert f"references {large} instead of None" in refusal(config(same)["dataset"])


def test_references_that_are_none(tmp_path: Path, built: Path) -> None:
    def sentence(references: object, **build: Any) -> str:
        return refusal(config(tmp_path / "new", references=references, **build)["dataset"])

    assert "must be the folder of a data set" in sentence(3)
    assert "must be the folder of a data set" in sentence(" ")
    assert "is no data set of the recipe 'slabs'" in sentence(str(tmp_path / "nowhere"))
    assert "the data set that is to be made" in sentence(str(tmp_path / "new"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "card.json").write_text('{"options": {"recipe": "collisions"}}')
    assert "is no data set of the recipe 'slabs'" in sentence(str(other))
    for energies in ("null", '{"29": "a lot"}', '{"29": NaN}', "[1]"):
        told = f'{{"options": {{"recipe": "slabs"}}, "reference_energies": {energies}}}'
        (other / "card.json").write_text(told)
        assert "references: " in sentence(str(other))
    told = '{"options": {"recipe": "slabs"}, "reference_energies": {"79": 0.5}}'
    (other / "card.json").write_text(told)
    assert "has no energies of the elements with the numbers" in sentence(str(other))
    assert not (tmp_path / "new").exists()


def test_data_of_another_origin_are_not_taken_for_built_ones(tmp_path: Path) -> None:
    (tmp_path / "slabs" / "train").mkdir(parents=True)
    assert "has no readable card.json" in refusal(config(tmp_path / "slabs")["dataset"])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(config(tmp_path / "file" / "slabs")["dataset"])
    assert f"cannot write in {tmp_path / 'file'}" in text
    assert "choose a folder" in text


def test_too_little_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    text = refusal(config(tmp_path / "slabs", train=10**10)["dataset"])
    assert "MB free; make room" in text
    assert {path.name for path in tmp_path.iterdir()} == {".slabs.lock"}


def test_collisions_without_tblite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)
    build = {"recipe": "collisions"}
    text = refusal({"train": {"src": str(tmp_path / "collisions/train"), "build": build}})
    assert "tblite" in text
    assert "pip install 'fairchem-kd[collisions]'" in text
    assert not list(tmp_path.iterdir())


def test_a_missing_path_without_build_is_refused(tmp_path: Path, built: Path) -> None:
    missing = tmp_path / "nowhere"
    text = refusal({"train": {"src": str(built / "train")}, "val": {"src": str(missing)}})
    assert text.startswith(f"dataset.val.src: {missing} does not exist")
    assert "build: {recipe: slabs}" in text
    # The older forms of a config, and a list of folders.
    assert refusal({"src": str(missing)}).startswith("dataset.src")
    assert refusal([{"src": str(missing)}]).startswith("dataset[0].src")
    assert refusal({"test": {"src": [str(built / "val"), str(missing)]}}).startswith("dataset.test")
    assert "must be a mapping with train" in refusal("data/slabs")
    assert "dataset.train is 'data/slabs'" in refusal({"train": "data/slabs"})


def test_a_split_without_frames_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no *.lmdb file" in refusal({"train": {"src": str(tmp_path / "empty")}})
    lmdb_file(tmp_path / "none" / "data.0000.lmdb", 0)
    assert "is empty (0 frames)" in refusal({"train": {"src": str(tmp_path / "none")}})
    lmdb_file(tmp_path / "none" / "data.0001.lmdb", 1)
    ensure_built({"dataset": {"train": {"src": str(tmp_path / "none")}}})
    (tmp_path / "meta").mkdir()
    lmdb_file(tmp_path / "meta" / "data.0000.lmdb", 0)
    np.savez(tmp_path / "meta" / "metadata.npz", natoms=np.zeros(0, dtype=int))
    assert "is empty (0 frames)" in refusal({"train": {"src": str(tmp_path / "meta")}})
    file = tmp_path / "none" / "data.0000.lmdb"
    with pytest.raises(UserError, match=r"dataset\.test\.src: .* is empty"):
        check_dataset({"src": str(file)}, "dataset.test")


def test_a_file_that_is_not_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.lmdb").write_bytes(b"not a database" * 1000)
    text = refusal({"train": {"src": str(tmp_path / "data.lmdb")}})
    assert "cannot be read as LMDB" in text


def test_other_formats_and_absent_splits_are_left_to_fairchem(tmp_path: Path) -> None:
    empty = str(tmp_path)
    ensure_built({"dataset": {"train": {"format": "ase_db", "src": empty}, "val": None}})
    # val takes its format from train, unless it is told not to.
    dataset = {"train": {"format": "ase_db", "src": empty}, "val": {"src": empty}}
    ensure_built({"dataset": dataset})
    dataset["val"]["use_train_settings"] = False  # type: ignore[assignment]
    assert refusal(dataset).startswith("dataset.val.src")
    ensure_built({})
    ensure_built({"dataset": None})
    ensure_built({"dataset": {"train": {"format": "lmdb"}}})


def test_a_file_that_this_process_has_open_is_taken_as_read(tmp_path: Path) -> None:
    lmdb_file(tmp_path / "data.lmdb", 2)
    held = lmdb.open(str(tmp_path / "data.lmdb"), subdir=False, readonly=True, lock=False)
    check_dataset({"src": str(tmp_path / "data.lmdb")}, "dataset.train")
    held.close()


# -- the command -----------------------------------------------------------------------------------


def test_the_command_builds_reports_and_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    command = ["data", "slabs", "--dest", str(root), "--train", "20", "--val", "1", "--test", "1",
               "--ood", "2", "--processes", "2"]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    card = read_card(root)
    assert card is not None
    assert card["versions"]["fairchem-kd"] == __version__
    assert f"{root}: made in" in out
    assert "train_1of4" in out
    assert f"{card['splits']['train']['force_rms_free']:.3f}" in out
    assert f"mean: {card['normalizer']['energy']['mean']:.6f}" in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:] if line}
    assert (rows["train"], rows["test_ood"]) == ("20", "2")

    assert main(command) == 0
    assert "was there already" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert f"error: the data set {root} was built with seed 0 instead of 1" in error
    assert main([*command, "--seed", "1", "--force"]) == 0
    replaced = read_card(root)
    assert replaced is not None
    assert replaced["options"]["seed"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".mine.lock"}


def test_the_command_refuses_sizes_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--train", "5"], ["--val", "x"], ["--processes", "0"], ["--seed", "-1"]):
        assert main(["data", "collisions", *wrong]) == 2
        assert "at least" in capsys.readouterr().err


def test_two_splits_that_are_one_lmdb(tmp_path: Path) -> None:
    lmdb_file(tmp_path / "a" / "data.0000.lmdb", 3)
    split = {"format": "lmdb", "src": str(tmp_path / "a")}
    again = {"format": "lmdb", "src": f"{tmp_path}/./a/"}
    assert "dataset.val.src and dataset.train.src are both" in refusal(
        {"train": split, "val": again}
    )
