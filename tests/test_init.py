"""``fairchem-kd init``: a student's config and a teacher in, the config of a distillation out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fairchem.core.common.utils import load_config
from fixtures.make_old_checkpoints import FOLDER
from models import small_model
from trainings import config, trainer, write_lmdb, write_teacher, write_yaml

from fairchem_kd.cli import main
from fairchem_kd.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.pairing import check_targets, choose, compare_normalizers, differences, facts
from fairchem_kd.teacher import Teacher
from fairchem_kd.units import Units

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("init")
    write_lmdb(root / "train", 6, seed=0)
    write_lmdb(root / "val", 2, seed=50)
    write_teacher(root / "teacher", root).rename(root / "teacher.pt")
    for name in ("painn", "schnet"):
        write_yaml(root / f"{name}.yml", config(root, root, model=name), cls="ocp")
    return root


def as_teacher(flavour: str, outputs: tuple[str, ...] = ("energy", "forces")) -> Teacher:
    return Teacher(small_model(flavour), Units({}, {}), {name: {} for name in outputs})


def test_a_config_is_written_and_trains(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["init", "--student", str(root / "painn.yml"), "--teacher", str(root / "teacher.pt")]
    assert main([*argv, "--strategy", "e2n,vanilla"]) == 0
    shown = capsys.readouterr().out
    assert "teacher" in shown
    assert "GemNetOC" in shown
    assert "energy   student mean 10, rmsd 2" in shown
    assert "teacher mean 8, rmsd 3" in shown
    assert "scale factors and no model.scale_file" in shown
    assert "dry run on 3 structures" in shown
    assert "without the teacher; 4 steps" in shown
    written = tmp_path / "painn_e2n_vanilla.yml"
    assert f"wrote {written.name}" in shown
    assert list(tmp_path.iterdir()) == [written]  # the dry run leaves nothing
    found, _, conflicts = load_config(str(written))
    assert not conflicts
    assert found["trainer"] == "fairchem_kd.DistillationTrainer"
    terms = parse_distillation(found["task"]).active_terms
    assert list(terms) == ["e2n", "vanilla"]
    assert terms["e2n"].options.teacher == "edge"
    assert "teacher: edge  # (N, 20)" in written.read_text()
    arguments = config(tmp_path, root, max_epochs=1)
    arguments["task"] = found["task"]
    arguments["task"]["distillation"]["statistics_samples"] = 4
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        assert built.step == 2
    assert main([*argv, "--strategy", "e2n,vanilla"]) == 2
    assert "exists; give --force" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["init", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    return sentences[0]


def test_refusals(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = ("--teacher", root / "teacher.pt")

    def say(student: Path, *argv: object) -> str:
        return refused(capsys, "--student", student, *teacher, *argv)

    sentence = say(root / "schnet.yml", "--strategy", "v2v")
    assert "vector" in sentence
    assert "This pair can have: n2n, e2n, vanilla, per_atom_energy" in sentence
    assert "unknown kind 'n3n' (did you mean 'n2n'?)" in say(
        root / "painn.yml", "--strategy", "n3n"
    )
    assert "does not exist" in say(tmp_path / "no.yml")
    plain = yaml.safe_load((root / "painn.yml").read_text())

    def edited(**changes: Any) -> Path:
        path = tmp_path / "edited.yml"
        kept = {key: value for key, value in {**plain, **changes}.items() if value is not None}
        path.write_text(yaml.safe_dump(kept))
        return path

    assert "no optim and no loss_functions" in say(edited(optim=None, loss_functions=None))
    assert "no dataset.train" in say(edited(dataset={"val": plain["dataset"]["val"]}))
    assert "distils already" in say(edited(task={"distillation": {"losses": {"n2n": {}}}}))
    assert "share no target" in say(edited(outputs={"stress": {"level": "system"}}))
    missing = {**plain["dataset"], "train": {"format": "lmdb", "src": "nowhere"}}
    assert "dataset.train.src" in say(edited(dataset=missing))
    (tmp_path / "edited.yml").write_text("- a\n")
    assert "cannot be read as a config" in say(tmp_path / "edited.yml")
    assert "fairchem 2" in refused(
        capsys, "--student", root / "painn.yml", "--teacher", FOLDER / "fairchem_2.pt"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["edited.yml"]


def test_the_last_layer_stands_in_for_a_default() -> None:
    """A GemNet-OC with gradient forces has no head of its edges: its last edges are taken."""
    found = choose("e2n", small_model("painn"), as_teacher("gemnet_oc_gradient"))
    assert found.options["teacher"] == "edge@2"
    assert found.options["student"] == "node"
    assert found.options["standardize"] is True


def test_a_teacher_of_energies_teaches_them() -> None:
    teacher = as_teacher("painn_energy", ("energy",))
    found = choose("vanilla", small_model("painn"), teacher)
    assert found.options["forces"] == 0
    assert check_targets(["energy", "forces"], teacher) == [
        "The teacher does not predict forces: only its features can teach that."
    ]
    with pytest.raises(UserError, match="share no target"):
        check_targets(["stress"], teacher)


def test_differences_are_named() -> None:
    ours = facts(small_model("painn", use_pbc=False, cutoff=3.0))
    theirs = facts(small_model("gemnet_oc"))
    notes = "\n".join(differences(ours, theirs))
    assert "sees 3 Å and the teacher 4.5 Å" in notes
    assert "use_pbc: false and the teacher true" in notes
    assert differences(theirs, {**theirs, "parameters": 10**9}) == []


def test_strange_normalizers_are_named() -> None:
    lines, notes = compare_normalizers(
        {"energy": {"mean": 0.0, "rmsd": 1.0}, "forces": {"fit": True}},
        {"energy": {"mean": 0.0, "rmsd": 23.06}},
    )
    assert len(lines) == 2
    assert "fitted to the data" in lines[1]
    assert len(notes) == 1
    assert "differ by a factor of 0.0434" in notes[0]
