"""A checkpoint's config is data: nothing of it is evaluated, imported, or built beyond reason."""

from __future__ import annotations

import copy
import random
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import chance, rounds
from trainings import inside

from fairchem_kd.analysis.subjects.calculators import make_calculator
from fairchem_kd.analysis.subjects.runs import ModelFile, read_model
from fairchem_kd.analysis.subjects.splits import split_settings
from fairchem_kd.commands import main as cli
from fairchem_kd.errors import UserError, report
from fairchem_kd.models.build import build_model
from fairchem_kd.models.file import read_checkpoint
from fairchem_kd.report.tables import Table

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "gemnet_oc_collisions.pt"
CANARY = "__import__('pathlib').Path('canary').touch()"

#: Where fairchem would evaluate, import or call what a config says, and what is put there.
CODE: dict[str, Any] = {
    "trainer": "os.system",
    "logger": "os.system",
    "logger.name": "os.system",
    "model.name": "torch.hub.load",
    "model": "torch.hub.load",
    "model.backbone": {"model": "torch.hub.load"},
    "model.heads": {"energy": {"module": "torch.hub.load"}},
    "model.finetune_config": {"starting_checkpoint": "other.pt"},
    "optim.optimizer": "os.system",
    "optim.scheduler": "os.system",
    "dataset.format": "os.system",
    "val_dataset.format": "os.system",
    "test_dataset.transforms": {CANARY: {}},
    "dataset.transforms": {"exec": "1"},
    "dataset.train_split_settings": {"transforms": {CANARY: {}}},
    "test_dataset.test_split_settings": {"format": "os.system"},
    "relax_dataset.transforms": {CANARY: {}},
    "loss_functions": [{"energy": {"fn": "os.system"}}],
    "loss_fns": [{"energy": {"fn": "os.system"}}],
    "evaluation_metrics.metrics": {"energy": [CANARY]},
    "eval_metrics.metrics": {"misc": ["exec"]},
    "task.distillation.losses": {"a": {"kind": "os.system"}},
    "task.distillation.unlabelled": {"transforms": {CANARY: {}}},
    "task.distillation.unlabelled.dataset": {"format": "os.system"},
    "task.distillation.unlabelled.dataset.transforms": {CANARY: {}},
    "task.distillation.unlabelled.dataset.splits": {"train": {"transforms": {CANARY: {}}}},
    "dataset.splits": {"train": {"format": "os.system"}},
    "test_dataset.splits": {"test": {"transforms": {CANARY: {}}}},
    "val_dataset.splits": {"val": {"splits": {"val": {"transforms": {CANARY: {}}}}}},
    "task.dataset": "os.system",
    "task.metrics": "os.system",
    "optim.loss_energy": "os.system",
    "optim.loss_force": "torch.hub.load",
    "outputs.energy.decomposition": {"x": {"fn": "os.system"}},
    "model.backbone.model": "torch.hub.load",
    "model.activation": "os.system",
    "something new": {"of": ["a", "os.system"]},
}

#: What no checkpoint holds: wrong types and sizes, by key of the file.
MALFORMED: dict[str, Any] = {
    "config.model": None,
    "config.model.name": None,
    "config.model.name ": 3,
    "config.model.cutoff": float("nan"),
    "config.model.cutoff ": float("inf"),
    "config.model.cutoff  ": -5.0,
    "config.model.hidden_channels": 0,
    "config.model.num_blocks": 10_000_000,
    "config.model.emb_size_atom": 3 * 10**11,
    "config.model.num_spherical": 5000,
    "config.model.backbone": {"model": "a", "lmax_list": [4000]},
    "config.model.num_radial": 10**6,
    "config.task": "train",
    "config.optim": [1],
    "config.outputs": "energy",
    "config.dataset": "data",
    "config.dataset.transforms": "normalizer",
    "config.loss_functions": {"energy": {}},
    "config.evaluation_metrics": "mae",
    "config.logger": 3,
    "config.trainer": {},
    "config.cmd": "a" * 200_000,
    "config.slurm": torch.ones(3),
    "state_dict": {1: torch.ones(2)},
    "state_dict ": {"a": "text"},
    "state_dict  ": {"a": torch.ones(3, 3).to_sparse()},
    "state_dict   ": {"a": torch.ones(1).expand(10**9)},
    "state_dict    ": {"a": torch.empty(3, device="meta")},
    "ema  ": {"shadow_params": [torch.ones(1).expand(10**9)]},
    "normalizers  ": {"energy": {"mean": torch.ones(1).expand(10**9)}},
    "normalizers": "text",
    "normalizers ": {"energy": 3},
    "elementrefs": "text",
    "ema": "text",
    "ema ": {"shadow_params": [1]},
    "scale_dict": "text",
}


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    return read_checkpoint(SHIPPED)


def put(contents: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with ``value`` at the dotted ``key``."""
    changed = copy.deepcopy(contents)
    tree, names = changed, key.strip().split(".")
    for name in names[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[names[-1]] = value
    return changed


@pytest.mark.parametrize("key", CODE)
def test_what_would_run_code_needs_trust(
    key: str, contents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(put(contents, f"config.{key}", CODE[key]), "x.pt")
    with pytest.raises(UserError, match=r"x\.pt is refused: config\..*trust") as refusal:
        read_checkpoint("x.pt")
    assert key.split(".")[0] in str(refusal.value)
    assert len(str(refusal.value)) < 600
    assert read_checkpoint("x.pt", trust=True)
    assert not Path("canary").exists()


@pytest.mark.parametrize("key", MALFORMED)
def test_what_no_checkpoint_holds_is_one_sentence(
    key: str, contents: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(put(contents, key, MALFORMED[key]), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        read_checkpoint(tmp_path / "x.pt")


def deep(levels: int = 900) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def endless() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["a"] = tree
    return tree


def laughs() -> list[Any]:
    tree: list[Any] = ["ha"] * 10
    for _ in range(9):
        tree = [tree] * 10
    return tree


@pytest.mark.parametrize("make", [deep, endless, laughs])
def test_a_config_that_grows_is_bounded(
    make: Callable[[], Any], contents: dict[str, Any], tmp_path: Path
) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # to write the file at all
    try:
        torch.save(contents | {"config": {**contents["config"], "cmd": make()}}, tmp_path / "x.pt")
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(UserError, match=r"levels deep|values|damaged"):
        read_checkpoint(tmp_path / "x.pt")


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(
    tmp_path: Path,
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(UserError, match=r"would unpack to 50,000,006"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_file_does_not_say_that_its_teacher_is_to_be_trusted(
    contents: dict[str, Any], tmp_path: Path
) -> None:
    key = "config.task.distillation.teacher"
    teacher = {"checkpoint": "t.pt", "trust_checkpoint": True}
    torch.save(put(contents, key, teacher), tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")["config"]["task"]["distillation"]["teacher"]
    assert read == {"checkpoint": "t.pt", "trust_checkpoint": False}


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "x.pt"],
        ["compare", "x.pt", "--cpu"],
        ["cka", "--student", "x.pt", "--teacher", "x.pt", "--cpu"],
        ["cost", "x.pt", "--cpu"],
        ["physics", "x.pt", "--cpu"],
        ["features", "x.pt", "a.traj", "--out", "f.npz", "--cpu"],
        ["report", "x.pt", "--cpu"],
        ["export", "x.pt", "y.pt"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_runs_what_a_file_says(
    command: list[str],
    contents: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(put(contents, "config.test_dataset.transforms", {CANARY: {}}), "x.pt")
    assert cli.main(command) == 2
    assert "config.test_dataset.transforms" in capsys.readouterr().err
    assert not Path("canary").exists()


def test_data_that_only_a_file_names_are_opened_below_the_current_directory_alone(
    contents: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(put(contents, "config.test_dataset", {"src": "../elsewhere"}), "x.pt")
    for command in (["compare", "x.pt"], ["cka", "--student", "x.pt", "--teacher", "x.pt"]):
        assert cli.main([*command, "--cpu"]) == 2
        assert "names its own data, '../elsewhere', outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"src": ["data/test", "/elsewhere"]}, "/elsewhere"),
        ({"src": "data/test", "splits": {"test": {"src": "../x"}}}, "../x"),
        ({"src": "data", "index_file": ["/etc/passwd"]}, "/etc/passwd"),
        ({"src": "data", "metadata_path": "/elsewhere/metadata.npz"}, "/elsewhere/metadata.npz"),
        ({"src": "postgresql://somebody@somewhere/data", "format": "ase_db"}, "postgresql://"),
        ({"src": "link/test"}, "link/test"),
    ],
)
def test_every_place_in_a_data_sets_config_counts(
    settings: dict[str, Any], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=rf"names its own data, '{place}"):
        ModelFile(Path("x.pt"), {}).check_data(settings, "name them")
    ModelFile(Path("x.pt"), {}, trust=True).check_data(settings, "name them")


@pytest.mark.parametrize("key", ["lin_ref", "oc20_ref"])
def test_what_fairchem_unpickles_beside_the_samples_needs_trust(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").touch()  # even in the folder of a run
    settings = {"src": "data", "splits": {"test": {key: "file"}}}
    with pytest.raises(UserError, match=rf"\({key}\) that fairchem unpickles"):
        ModelFile(Path("best_checkpoint.pt"), {}).check_data(settings, "name them")
    assert key not in split_settings({"dataset": {"src": "a", key: "file"}}, "b")


def test_a_calculator_in_a_job_does_not_unpickle_what_a_file_names(
    contents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock, in a SLURM job, unpickles a file in the folder that ``slurm`` names."""
    monkeypatch.chdir(tmp_path)
    code = b"cpathlib\nPath\n(S'canary'\ntR."  # a pickle that would at least import
    (tmp_path / "7_submitted.pkl").write_bytes(code)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    changed = put(contents, "config.slurm", {"folder": str(tmp_path)})
    changed["config"]["is_debug"] = False
    torch.save(changed, "x.pt")
    opened: list[str] = []
    monkeypatch.setattr("pickle.load", lambda file, *_: opened.append(file.name))
    with inside(tmp_path):
        make_calculator(read_model("x.pt"))
    assert opened == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7_submitted.pkl", "x.pt"]


def test_a_config_of_a_far_larger_model_than_the_weights_is_not_built(
    contents: dict[str, Any], tmp_path: Path
) -> None:
    changed = copy.deepcopy(contents)
    changed["config"]["model"] |= {"emb_size_atom": 40_000, "emb_size_edge": 40_000}
    torch.save(changed, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"describes a model of [\d,]+ parameters, and its weights"):
        build_model(read_checkpoint(tmp_path / "x.pt"), "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # kB


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path) -> None:
    """torch reads damaged weights as they are; the archive's own checksums tell."""
    whole = SHIPPED.read_bytes()
    chance, same = random.Random(0), 0
    expected = torch.load(SHIPPED, weights_only=False)
    for _ in range(40):
        place = chance.randrange(8 * len(whole))
        spoiled = bytearray(whole)
        spoiled[place // 8] ^= 1 << place % 8
        (tmp_path / "x.pt").write_bytes(spoiled)
        try:
            found = read_checkpoint(tmp_path / "x.pt")
        except UserError:
            continue
        same += 1  # in what no record holds: padding, times, names
        for name, value in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], value)
        assert found["config"] == expected["config"]
    assert same < 10


def test_a_file_without_checksums_is_read(contents: dict[str, Any], tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "x.pt").keys() == contents.keys()


def test_names_in_a_file_are_shown_and_not_obeyed(
    contents: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a\nerror: fake\x1b[2J<script>|`[x](javascript:y)"
    torch.save(put(contents, "config.cmd", {"identifier": evil}), tmp_path / "best_checkpoint.pt")
    name = read_model(tmp_path / "best_checkpoint.pt").identifier
    assert "\n" not in name
    assert "\x1b" not in name
    table = Table("of " + evil, ["model"], notes=["note " + evil])
    table.add(evil)
    for text in (table.markdown(), table.text()):
        assert "\x1b" not in text
        assert not any(line.startswith("error:") for line in text.splitlines())
    assert "<script>" not in table.markdown()
    assert "](javascript" not in table.markdown()
    assert report(UserError("the run " + evil)) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert not any(line.startswith("error: fake") for line in said.splitlines())


def test_whatever_stands_in_a_config_is_read_or_refused(
    contents: dict[str, Any], tmp_path: Path
) -> None:
    """Seeded: values of any kind anywhere in the file end in contents or in one sentence."""
    luck = chance()
    values = [None, 0, -1, 10**12, float("nan"), "", "a.b", "x" * 200, [], {}, [[]], {"a": {}}]
    values += [{1: 2}, torch.ones(1), b"bytes", True, CANARY, {CANARY: CANARY}]
    keys = [("config",), ("state_dict",), ("normalizers",), ("elementrefs",), ("ema",)]

    def walk(tree: Any, path: tuple[Any, ...]) -> None:
        if isinstance(tree, dict):
            for name, inner in tree.items():
                keys.append((*path, name))
                walk(inner, (*path, name))

    walk(contents["config"], ("config",))
    small = {**contents, "state_dict": {"a": torch.ones(1)}}
    refused = 0
    for _ in range(rounds(400)):
        changed, path = copy.deepcopy(small), luck.choice(keys)
        tree = changed
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = luck.choice(values)
        torch.save(changed, tmp_path / "x.pt")
        try:
            read_checkpoint(tmp_path / "x.pt")
        except UserError:
            refused += 1
    assert 0.25 * rounds(400) < refused < rounds(400)
