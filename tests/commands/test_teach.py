"""``fairchem-kd teach``: a store filled ahead, whole, in parts, by jobs; looked into; verified."""

from __future__ import annotations

import argparse
import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from trainings import config, count_asked, trainer, write_home, write_lmdb, write_yaml

from fairchem_kd.commands import teach
from fairchem_kd.commands.arguments import Parser
from fairchem_kd.commands.main import main
from fairchem_kd.store import Card, Reader
from fairchem_kd.teachers import filling

DATA = ["data/train", "--teacher", "teacher.pt", "--features", "node", "edge", "--cpu"]
CALCULATOR = ["--calculator", "ase.calculators.emt:EMT", "--out", "s"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainings import inside

    folder = tmp_path_factory.mktemp("home")
    with inside(folder):
        write_home({"train": 11, "val": 2})
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with data and a teacher; groups of 3, so that there are some."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(filling, "GROUP", 3)
    monkeypatch.setattr("fairchem_kd.distillation.teaching.GROUP", 3)
    yield tmp_path / "home"
    gc.collect()  # closes data sets


def write_config(**distillation: Any) -> None:
    block = {"teacher": {"checkpoint": "teacher.pt"}, "losses": {"n2n": {}}, **distillation}
    write_yaml(Path("config.yml"), config(Path(), Path("data"), distillation=block))


def answers(store: str) -> dict[bytes, dict[str, np.ndarray]]:
    """Everything that a store says, by structure."""
    reader, found = Reader(store), {}
    for shard in reader.shards:
        for entry in shard.entries:
            key = entry["key"].tobytes()
            found[key] = reader.read(key, [column.name for column in shard.columns])
    reader.close()
    return found


def assert_same(one: str, other: str) -> None:
    left, right = answers(one), answers(other)
    assert left.keys() == right.keys()
    for key, values in left.items():
        assert values.keys() == right[key].keys()
        assert all(np.array_equal(value, right[key][name]) for name, value in values.items())


def test_data_are_asked_about_once_and_verified(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["teach", *DATA, "--out", "store"]) == 0
    out = capsys.readouterr().out
    assert "store: 11 structures in 1 shards" in out
    assert "computed in fp32" in out
    for column in ("output:forces", "feature:node:node", "feature:edge:node"):
        assert f"{column} " in out
    assert main(["teach", "verify", "store", "--samples", "5", "--cpu"]) == 0
    out = capsys.readouterr().out
    assert "11 records are whole, 0 are damaged" in out
    assert "5 structures were asked about again" in out

    asked = count_asked(monkeypatch)
    assert main(["teach", *DATA, "--out", "store"]) == 0  # nothing is left to be asked
    assert sum(asked) <= 5

    shard = next(Path("store/shards").glob("*.data"))
    spoiled = bytearray(shard.read_bytes())
    spoiled[-20] ^= 1
    shard.write_bytes(spoiled)
    capsys.readouterr()
    assert main(["teach", "verify", "store", "--cpu"]) == 1
    assert "10 records are whole, 1 are damaged" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["fp32", "fp16"])
def test_a_store_in_bf16_is_verified_in_bf16(
    home: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And features that were rounded when they were kept are within what their card says."""
    own = {"checkpoint": "teacher.pt", "store": "store", "store_features": kept}
    write_config(teacher=own)
    assert main(["teach", "config.yml", "--precision", "bf16", "--cpu"]) == 0
    card = Card.read(Path("store"))
    assert card is not None
    assert (card.precision, card.features) == ("bf16", kept)
    assert main(["teach", "verify", "store", "--cpu"]) == 0
    capsys.readouterr()
    assert main(["teach", "config.yml", "--cpu"]) == 2
    error = capsys.readouterr().err
    assert "computed in bf16, and task.distillation.teacher.precision is fp32" in error


def test_parts_are_together_what_one_process_does(home: Path) -> None:
    write_config(rattle={"copies": 1, "pool": 2})
    assert main(["teach", "config.yml", "--out", "whole", "--cpu"]) == 0
    for part in ("2/3", "1/3", "3/3"):
        assert main(["teach", "config.yml", "--out", "parts", "--cpu", "--part", part]) == 0
    assert len(list(Path("parts/shards").glob("*.index"))) == 3
    assert len(answers("whole")) > 11
    assert_same("whole", "parts")


@pytest.mark.slow
def test_jobs_are_together_what_one_process_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through submitit's local executor; two groups, one for each job."""
    monkeypatch.setattr(filling, "GROUP", 32)
    monkeypatch.setattr("fairchem_kd.distillation.teaching.GROUP", 32)
    write_lmdb(Path("data/many"), 35, seed=70)
    words = ["teach", "data/many", *DATA[1:], "--out"]
    assert main([*words, "whole"]) == 0
    gc.collect()
    code = f"""
from fairchem_kd.commands.teach_jobs import Request, submit
given = {{"parallel": 2, "cpu": True, "memory": 2, "hours": 1}}
assert submit({[*words, "parts"]!r}, Request(parts=2, **given), cluster="local") == []
gone = {["teach", "data/gone", *DATA[1:]]!r}
(failed,) = submit(gone, Request(parts=1, **given), cluster="local")
print("its log:", failed.paths.stderr)
"""
    submission = Command([code], home, home / "log", of="python")
    submission.finish()
    assert sorted(len(shard.entries) for shard in Reader("parts").shards) == [3, 32]
    assert_same("whole", "parts")
    said, _, log = submission.log.read_text().partition("its log: ")
    assert "data/gone" in said.rpartition("; see")[0].splitlines()[-1]
    assert "data/gone" in Path(log.strip()).read_text()


def parsed(words: list[str]) -> argparse.Namespace:
    parser = Parser()
    teach.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        [*DATA, "--out", "a b", "--max-gb", "0.5", "--precision", "tf32", "--trust"],
        ["data/train", "data/val", "--teacher", "teacher.pt"],
        ["config.yml"],
    ],
)
def test_jobs_are_told_what_was_asked(words: list[str]) -> None:
    args = parsed([*words, "--submit", "--parts", "3", "--slurm-partition", "gpu"])
    plain = parsed([*words, "--part", "1/3"])
    command, *told = teach._words(args)
    assert command == "teach"
    assert parsed([*told, "--part", "1/3"]) == plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*DATA, "--part", "4/3"], "--part 4/3 must read I/N"),
        ([*DATA, "--part", "1/3", "--submit"], "--part goes with neither"),
        ([*DATA, "--part", "1/3", "--processes", "2"], "--part goes with neither"),
        ([*DATA, "--processes", "2", "--submit"], "--parts says how many"),
        (["data/train", "--submit"], "teach DATA needs --teacher"),
        (["data/train"], "teach DATA needs --teacher"),
        (["data/gone", *DATA[1:], "--submit"], "data/gone does not exist"),
        (["gone.yml", "--submit"], "gone.yml does not exist"),
        (["bad.yml", "--submit"], "has an unknown key 'stroe' (did you mean 'store'?)"),
        (["gone.yml"], "gone.yml does not exist"),
        (["lost.yml"], "lost.yml includes base.yml, which is neither in the current directory"),
        (["lost.yml", *CALCULATOR], "lost.yml includes base.yml, which is neither in the current"),
        (["lost.yml", "--submit"], "lost.yml includes base.yml, which is neither in the current"),
        (["half.yml"], "half.yml has no model and no optim block"),
        (["config.yml", "--features", "node"], "give it alone"),
        (["info", "data"], "is no store"),
        (["verify", "gone"], "is no store"),
        (["info"], "takes one STORE"),
    ],
)
def test_what_cannot_work_is_refused(
    home: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = "{model: {}, optim: {}, dataset: {}, task: {distillation: {teacher: {stroe: b}}}}"
    Path("bad.yml").write_text(blocks + "\n")
    Path("lost.yml").write_text("includes: [base.yml]\n")
    Path("half.yml").write_text("dataset: {}\n")
    write_config()
    assert main(["teach", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("teach_jobs").exists()


def test_a_training_reads_what_was_taught_ahead(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config()
    assert main(["teach", "config.yml", "--out", "store", "--cpu"]) == 0
    gc.collect()
    asked = count_asked(monkeypatch)
    own = {"checkpoint": "teacher.pt", "store": "store"}
    given = config(Path(), Path("data"), distillation={"teacher": own, "losses": {"n2n": {}}})
    with trainer(given) as built:
        built.train(disable_eval_tqdm=True)
    assert sum(asked) <= 5
