"""Bad input through the real command: one sentence, exit code 2, and no checkpoint left behind."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fairchem.core.common import distutils
from trainings import config, write_lmdb, write_splits, write_teacher, write_yaml

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.commands.main import main as fairchem_kd
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("data"), train=(6, 0), val=(2, 50))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    found = {
        name: write_teacher(root / name, data, name) for name in ("gemnet_oc", "painn", "schnet")
    }
    contents = found["gemnet_oc"].read_bytes()
    found["truncated"] = root / "truncated.pt"
    found["truncated"].write_bytes(contents[: len(contents) // 2])
    checkpoint = torch.load(found["gemnet_oc"], weights_only=False)
    for name in checkpoint["state_dict"]:
        if name.endswith("scale_factor"):
            checkpoint["state_dict"][name].zero_()
    found["unfitted"] = root / "unfitted.pt"
    torch.save(checkpoint, found["unfitted"])
    return found


def refusal(
    path: Path, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    """What the command says, after the checks that every refusal has to pass."""
    yml = write_yaml(path / "run.yml", arguments)
    argv = ["main", "--mode", "train", "--config-yml", str(yml), "--run-dir", str(path), "--cpu"]
    gc.collect()  # LMDB opens a file once in a process; the last refusal's trainer may linger
    try:
        assert fairchem([*argv, *more]) == 2
    finally:
        distutils.cleanup()
    error = capsys.readouterr().err
    sentence = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentence) == 1
    assert "Traceback" not in error
    assert not list(path.rglob("*checkpoint.pt"))
    assert not list(path.rglob("*.part"))
    return sentence[0]


LOSS_CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("painn", "gemnet_oc", {"n3n": {}}, ("task.distillation.losses.n3n", "did you mean 'n2n'?")),
    ("painn", "gemnet_oc", {"n2n": {"teacher": "nod"}}, ("losses.n2n.teacher", "'nod'", "node")),
    ("painn", "gemnet_oc", {"n2n": {"student": "node@9"}}, ("losses.n2n.student", "node@9")),
    ("painn", "gemnet_oc", {"n2n": {"projetion": "mlp"}}, ("did you mean 'projection'?",)),
    ("painn", "gemnet_oc", {"n2n": {"coefficient": -1}}, ("n2n.coefficient", "at least 0")),
    ("schnet", "gemnet_oc", {"v2v": {}}, ("losses.v2v.student", "vector")),
    ("painn", "schnet", {"v2v": {}}, ("losses.v2v.teacher", "vector")),
    ("painn", "schnet", {"e2n": {}}, ("losses.e2n.teacher", "edge")),
    (
        "painn",
        "gemnet_oc",
        {"n2n": {"projection": "identity"}},
        ("losses.n2n.projection", "identity", "16", "12"),
    ),
]


@pytest.mark.parametrize(("student", "teacher", "losses", "words"), LOSS_CASES)
def test_losses(
    tmp_path: Path,
    data: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    student: str,
    teacher: str,
    losses: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    arguments = config(tmp_path, data, model=student, teacher=teachers[teacher], losses=losses)
    sentence = refusal(tmp_path, arguments, capsys)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("absent", ("absent.pt does not exist",)),
        ("truncated", ("truncated",)),
        ("unfitted", ("scale factor", "fit-scales")),
        ("malicious", ("trust_checkpoint: true",)),
    ],
)
def test_teachers(
    tmp_path: Path,
    data: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    teacher: str,
    words: tuple[str, ...],
) -> None:
    marker = tmp_path / "was_here"
    paths = {**teachers, "absent": Path("absent.pt"), "malicious": tmp_path / "malicious.bin"}
    paths["malicious"].write_bytes(pickle.dumps({"state_dict": Payload(marker)}, protocol=2))
    arguments = config(tmp_path, data, teacher=paths[teacher], losses={"n2n": {}})
    sentence = refusal(tmp_path, arguments, capsys)
    for word in words:
        assert word in sentence
    assert not marker.exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "x")))
    assert (tmp_path / "x").exists()


def test_an_element_that_the_teacher_does_not_know(
    tmp_path: Path, data: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config(tmp_path, data, teacher=teachers["gemnet_oc"], losses={"n2n": {}})
    arguments["task"]["distillation"]["teacher"]["elements"] = ["H", "O", "Cu"]
    sentence = refusal(tmp_path, arguments, capsys)
    assert "Pt" in sentence


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("pos", "positions that are not finite"),
        ("energy", "energy label"),
        ("forces", "forces label"),
    ],
)
def test_not_a_number(
    tmp_path: Path,
    data: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    key: str,
    words: str,
) -> None:
    def spoil(value: Any, index: int) -> Any:
        return value * float("nan") if index == 2 else value

    write_lmdb(tmp_path / "data" / "train", 6, seed=0, **{key: spoil})
    # n2n looks at the structures first to standardise the teacher's features, vanilla does not
    losses = {"n2n": {}} if key == "pos" else {"vanilla": {}}
    for loss in ({"vanilla": {}}, losses):
        arguments = config(tmp_path, data, teacher=teachers["painn"], losses=loss)
        arguments["dataset"]["train"]["src"] = str(tmp_path / "data" / "train")
        sentence = refusal(tmp_path, arguments, capsys)
        assert words in sentence
        assert "sid 2" in sentence


def test_datasets(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = config(tmp_path, data)
    arguments["dataset"]["train"]["src"] = str(tmp_path / "nowhere")
    sentence = refusal(tmp_path, arguments, capsys)
    assert "dataset.train.src" in sentence
    assert "nowhere" in sentence
    write_lmdb(tmp_path / "empty", 0, seed=0)
    arguments["dataset"]["train"]["src"] = str(tmp_path / "empty")
    assert "dataset.train" in refusal(tmp_path, arguments, capsys)


def test_configs(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = config(tmp_path, data, scheduler="ReduceLROnPlateau")
    del arguments["dataset"]["val"]
    assert "dataset.val" in refusal(tmp_path, arguments, capsys)
    assert "max_epochs=3" in refusal(tmp_path, arguments, capsys, "--optim.max_epochs", "3")
    (tmp_path / "empty.yml").write_text("")
    argv = ["--mode", "train", "--config-yml", str(tmp_path / "empty.yml"), "--cpu"]
    assert fairchem(argv) == 2
    assert "empty.yml" in capsys.readouterr().err


def test_from_the_command_line(
    tmp_path: Path, data: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config(tmp_path, data, teacher=teachers["gemnet_oc"], losses={"n2n": {}})
    override = "--task.distillation.losses.n2n.coefficient=-1e-3"
    assert "losses.n2n.coefficient" in refusal(tmp_path, arguments, capsys, override)
    # YAML's null is none at all, so that what is refused is the key after it
    more = ("--dataset.train.build=null", "--model.hidden_chanels=3")
    assert "hidden_chanels" in refusal(tmp_path, arguments, capsys, *more)


def test_graph_parallel_is_refused(
    tmp_path: Path,
    data: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = config(tmp_path, data, teacher=teachers["gemnet_oc"], losses={"n2n": {}})
    said = refusal(tmp_path, arguments, capsys, "--gp-gpus", "2")
    assert said == "error: --gp-gpus: distillation does not run graph-parallel; remove the flag."


PLACES = {
    "no trainer": lambda c: c.pop("trainer"),
    "stock's": lambda c: c.update(trainer="ocp"),
    "at the top": lambda c: c.update(distillation=c["task"].pop("distillation")),
    "elsewhere": lambda c: c["optim"].update(distillation=c["task"].pop("distillation")),
    "near miss": lambda c: c.update(datset=c["dataset"]),
    "normaliser": lambda c: transforms(c).update(normaliser=transforms(c).pop("normalizer")),
    "of no output": lambda c: transforms(c)["normalizer"].update(enery={"mean": 0, "rmsd": 1}),
    "of validation": lambda c: c["dataset"]["val"].update(
        transforms={"normalizer": {"energy": {"mean": 0.0, "rmsd": 1.0}}}
    ),
    "unlabelled": lambda c: c["task"]["distillation"].update(
        unlabelled={"dataset": {"format": "lmdb", "scr": "more"}}
    ),
    "optimiser": lambda c: c["optim"].update(optimizer_params={"weigth_decay": 0.1}),
    "decay": lambda c: c["optim"].update(optimizer_params={"weight_decay": -1}),
    "unknown": lambda c: c["optim"].update(optimizer_params={"nonsense": 1}),
    "elements": lambda c: c["task"]["distillation"]["teacher"].update(elements=[]),
    "folder": lambda c: None,
}


def transforms(contents: dict[str, Any]) -> dict[str, Any]:
    return contents["dataset"]["train"]["transforms"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no trainer", "trainer is 'ocp', which would train plainly"),
        ("stock's", "trainer is 'ocp', which would train plainly"),
        ("at the top", "distillation stands where nobody reads it"),
        ("elsewhere", "optim.distillation stands where nobody reads it"),
        ("near miss", "the config has an unknown key 'datset' (did you mean 'dataset'?)"),
        ("normaliser", "dataset.train.transforms has an unknown key 'normaliser'"),
        ("of no output", "normalizer has an unknown key 'enery' (did you mean 'energy'?)"),
        ("of validation", "dataset.val.transforms.normalizer is not read"),
        ("unlabelled", "task.distillation.unlabelled.dataset.src is required"),
        ("optimiser", "optimizer_params has an unknown key 'weigth_decay' (did you mean"),
        ("decay", "optimizer_params do not fit AdamW: Invalid weight_decay value: -1"),
        ("unknown", "optimizer_params do not fit AdamW: "),
        ("elements", "teacher.elements is empty"),
        ("folder", "--run-dir"),
    ],
)
def test_what_nobody_would_read_is_refused(
    tmp_path: Path,
    data: Path,
    teachers: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    case: str,
    words: str,
) -> None:
    """Each trained another student than was meant, without a word, or ended in a traceback."""
    arguments = config(tmp_path, data, teacher=teachers["painn"], losses={"n2n": {}})
    path = write_yaml(tmp_path / "run.yml", arguments)
    contents = yaml.safe_load(path.read_text())
    PLACES[case](contents)
    path.write_text(yaml.safe_dump(contents))
    folder = path if case == "folder" else tmp_path  # a file
    argv = ["--mode", "train", "--config-yml", str(path), "--run-dir", str(folder), "--cpu"]
    assert fairchem(argv) == 2
    assert words in capsys.readouterr().err


def test_weights_of_another_model_and_an_output_that_nothing_learns(
    tmp_path: Path, data: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config(tmp_path, data)
    said = refusal(tmp_path, arguments, capsys, "--checkpoint", str(teachers["gemnet_oc"]))
    assert "gemnet_oc" in said
    assert "its weights do not fit the model of this config" in said
    arguments["loss_functions"] = [{"energy": {"fn": "mae", "coefficient": 1}}]
    said = refusal(tmp_path, arguments, capsys)
    assert "No loss reaches" in said
    assert "out_forces" in said


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("forces", -1.0, "forces is -1 times the labels of dataset.train, so that these or"),
        ("forces", 23.061, "forces is 0.0434 times the labels"),
        ("energy", -1.0, "energy is -1 times the labels"),
        ("energy", 1 / 27.2114, "energy is 27.2 times the labels"),
        ("energy", 1 / 13.3, "energies per atom, and not of whole structures"),
    ],
)
def test_labels_in_other_units_than_the_teacher(
    tmp_path: Path,
    emt: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    change: float,
    words: str,
) -> None:
    """The teacher is EMT, whose labels the data have before they are spoiled."""
    edit = {key: lambda value, _: change * value}
    write_lmdb(tmp_path / "train", 24, seed=0, **edit)
    distillation = {"teacher": {"store": str(emt / "store")}, "losses": {"vanilla": {}}}
    arguments = config(tmp_path, emt, distillation=distillation)
    arguments["dataset"]["train"]["src"] = str(tmp_path / "train")
    assert words in refusal(tmp_path, arguments, capsys)


@pytest.fixture(scope="module")
def emt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_splits(tmp_path_factory.mktemp("emt"), train=(24, 0), val=(2, 50))
    words = ["--calculator", "ase.calculators.emt:EMT", "--out", str(root / "store")]
    assert fairchem_kd(["teach", str(root / "train"), *words]) == 0
    return root


def test_an_off_of_yaml_is_off() -> None:
    block = {"teacher": {"checkpoint": "a.pt", "store": False}, "losses": {"n2n": {}}}
    assert parse_distillation({"distillation": block}).teacher.store == "off"
    block["teacher"] = {"checkpoint": "a.pt", "store": True}
    with pytest.raises(UserError, match=r"store must be"):
        parse_distillation({"distillation": block})
