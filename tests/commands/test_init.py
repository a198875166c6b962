"""``fairchem-kd init``: a student's config and a teacher in, the config of a distillation out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fairchem.core.common.utils import load_config
from fixtures.make_old_checkpoints import FOLDER
from models import build_model, small_model
from trainings import config, trainer, write_lmdb, write_teacher, write_yaml

from fairchem_kd.commands.fairchem import main as fairchem
from fairchem_kd.commands.init import _normalizer
from fairchem_kd.commands.main import main
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.distillation.pairing import (
    check_targets,
    choose,
    compare_normalizers,
    differences,
)
from fairchem_kd.errors import UserError
from fairchem_kd.features.facts import facts
from fairchem_kd.launch.config import make_parser, read_config
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.models.units import Units
from fairchem_kd.reading import read_json

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


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    gc.collect()  # LMDB opens a file once in a process


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
    plain = tmp_path / "painn_plain.yml"
    assert sorted(tmp_path.iterdir()) == [written, plain]  # the dry run leaves nothing
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


def test_what_is_proposed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a strategy: the teacher's outputs, and features that are alike; and a baseline."""
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "more", 12, seed=70)
    argv = ["init", "--student", str(root / "painn.yml"), "--teacher", str(root / "teacher.pt")]
    assert main([*argv, "--unlabelled", "more", "--fit-scales"]) == 0
    shown = capsys.readouterr().out
    assert "features that are alike" in shown
    assert "@0" not in shown  # embeddings of the elements say nothing of a structure
    assert "proposed: vanilla and" in shown
    assert "--unlabelled" not in shown  # nothing more is advised
    found, _, _ = load_config("painn_kd.yml")
    distillation = parse_distillation(found["task"])
    vanilla, feature = distillation.active_terms.values()
    assert vanilla.coefficient == 10
    assert feature.kind in ("n2n", "e2n")
    assert feature.options.student in ("node", "node@3")  # what the heads take in
    # 6 labelled and 12 others: of the 3 structures of a step 2 have no labels
    assert distillation.unlabelled is not None
    assert distillation.unlabelled.share == pytest.approx(2 / 3, abs=1e-4)
    assert distillation.unlabelled.per_step(1) == 2
    assert found["optim"]["batch_size"] == 1
    assert found["optim"]["max_epochs"] == 1
    scales = Path(found["model"]["scale_file"])
    assert len(read_json(scales)) == 3
    plain, _, _ = load_config("painn_plain.yml")
    assert plain["model"]["scale_file"] == str(scales)
    assert parse_distillation(plain["task"]).active_terms == {}
    assert plain["optim"]["batch_size"] == 3
    for name in ("painn_kd", "painn_plain"):
        gc.collect()
        assert fairchem(["main", "--mode", "train", "--cpu", "--config-yml", f"{name}.yml",
                         "--identifier", name, "--run-dir", "runs", "--optim.max_epochs=1",
                         "--optim.eval_every=2",
                         "--task.distillation.statistics_samples=4"]) == 0  # fmt: skip
    assert len(list(Path("runs/checkpoints").glob("*/best_checkpoint.pt"))) == 2


def test_a_proposal_for_labelled_structures(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schnet_plain.yml").write_text("# mine\n")
    argv = ["init", "--student", str(root / "schnet.yml"), "--teacher", str(root / "teacher.pt")]
    assert main([*argv, "--no-dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "v2v" not in shown  # SchNet has no vectors
    assert "give them with --unlabelled" in shown
    assert "schnet_plain.yml, the baseline, is there already" in shown
    assert (tmp_path / "schnet_plain.yml").read_text() == "# mine\n"
    found, _, _ = load_config("schnet_kd.yml")
    terms = parse_distillation(found["task"]).active_terms
    assert terms["vanilla"].coefficient == 1
    assert "optim" not in yaml.safe_load((tmp_path / "schnet_kd.yml").read_text())
    (tmp_path / "no").mkdir()
    assert "is no LMDB" in refused(
        capsys, "--student", root / "schnet.yml", "--teacher", root / "teacher.pt",
        "--unlabelled", "no", "--force",
    )  # fmt: skip


def test_refusals(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = ("--teacher", root / "teacher.pt")

    def say(student: Path, *argv: object) -> str:
        return refused(capsys, "--student", student, *teacher, *argv)

    sentence = say(root / "schnet.yml", "--strategy", "v2v")
    assert "vector" in sentence
    can = sentence.partition("This pair can have: ")[2]
    assert "e2n" in can
    assert "n2n_by_head, per_atom_energy" in can
    assert "v2v" not in can
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


def ocp_era(plain: dict[str, Any], root: Path) -> dict[str, Any]:
    """A config as OCP's users have it: a list of splits, labels' numbers and losses elsewhere."""
    numbers = {"target_mean": 10.0, "target_std": 2.0, "grad_target_std": 1.5}
    return {
        "trainer": "forces",
        "logger": "tensorboard",
        "task": {"dataset": "trajectory_lmdb", "train_on_free_atoms": True},
        "dataset": [
            {"src": str(root / "train"), "normalize_labels": True, **numbers},
            {"src": str(root / "val")},
        ],
        "model": plain["model"],
        "optim": {**plain["optim"], "force_coefficient": 7, "max_epochs": 1, "eval_every": 2},
    }


@pytest.mark.filterwarnings("ignore:Use of 'stdev' is deprecated")  # stock's own spelling
def test_a_config_of_ocp(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock trains with it, and so does what is written: with its losses and normalisers."""
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load((root / "painn.yml").read_text())
    Path("old.yml").write_text(yaml.safe_dump(ocp_era(plain, root)))
    teacher = str(root / "teacher.pt")
    argv = ["init", "--student", "old.yml", "--teacher", teacher, "--strategy", "vanilla"]
    assert main(argv) == 0
    assert "energy   student mean 10, stdev 2" in capsys.readouterr().out
    found, _, _ = load_config("old_vanilla.yml")
    arguments = config(tmp_path, root)
    for key in ("outputs", "loss_functions", "evaluation_metrics"):
        arguments[key] = {}
    arguments |= {"task": found["task"], "dataset": found["dataset"], "optimizer": found["optim"]}
    with trainer(arguments) as built:
        coefficients = {name: loss["coefficient"] for name, loss in built.loss_functions}
        assert coefficients == {"energy": 1, "forces": 7}
        assert built.normalizers["forces"].rmsd == 1.5
        built.train(disable_eval_tqdm=True)
        assert built.step == 2
        assert built.best_val_metric < 1e9  # the primary metric that stock has for `forces`


def test_keys_of_other_releases_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load((root / "painn.yml").read_text())
    plain["trainer"] = "fairchem_kd.DistillationTrainer"

    def say(**changes: Any) -> str:
        kept = {key: value for key, value in {**plain, **changes}.items() if value is not None}
        Path("edited.yml").write_text(yaml.safe_dump(kept))
        assert fairchem(["--mode", "train", "--config-yml", "edited.yml", "--cpu"]) == 2
        trained = capsys.readouterr().err.splitlines()[-1]
        shown = refused(capsys, "--student", "edited.yml", "--teacher", root / "teacher.pt")
        assert trained == shown.replace("--student edited.yml", "the config edited.yml")
        return shown

    assert "'loss_fns', which fairchem-core 1.x calls 'loss_functions': rename it" in say(
        loss_fns=plain["loss_functions"], loss_functions=None
    )
    assert "'eval_metrics'" in say(
        eval_metrics=plain["evaluation_metrics"], evaluation_metrics=None
    )
    assert "names its model as checkpoints of OCP did (model: painn)" in say(
        model="painn", model_attributes={"hidden_channels": 16}
    )


def test_stock_trainers_ignore_such_keys_as_they_do(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock's defaults go with the names of its trainers, and evaluations need no losses."""
    plain = yaml.safe_load((root / "painn.yml").read_text())
    plain["eval_metrics"] = plain.pop("evaluation_metrics")
    path = tmp_path / "edited.yml"
    path.write_text(yaml.safe_dump({**plain, "trainer": "forces"}))
    args = make_parser().parse_args(["--mode", "predict", "--config-yml", str(path)])
    with caplog.at_level("WARNING"):
        assert read_config(args, [])["eval_metrics"] == plain["eval_metrics"]
    assert "has 'eval_metrics', which fairchem-core 1.x calls" in caplog.text
    path.write_text(yaml.safe_dump({**plain, "trainer": "fairchem_kd.DistillationTrainer"}))
    with pytest.raises(UserError, match="'eval_metrics'"):
        read_config(args, [])


def test_what_only_a_training_would_find(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load((root / "painn.yml").read_text())

    def say(**changes: Any) -> str:
        Path("edited.yml").write_text(yaml.safe_dump({**plain, **changes}))
        return refused(capsys, "--student", "edited.yml", "--teacher", root / "teacher.pt")

    assert "it has no outputs" in say(outputs={})
    nowhere = {**plain["dataset"], "val": {"format": "lmdb", "src": "nowhere"}}
    assert "dataset.val.src" in say(dataset=nowhere)
    energy_alone = {"energy": plain["outputs"]["energy"]}
    assert "compares 'forces', which is not under outputs" in say(outputs=energy_alone)
    assert [path.name for path in tmp_path.iterdir()] == ["edited.yml"]


def test_a_fitted_normalizer_is_said_to_be_fitted() -> None:
    fit = {"fit": {"targets": {"energy": {"mean": 0.0}, "forces": {"mean": 0.0}}}}
    train = {"transforms": {"normalizer": fit}}
    lines, _ = compare_normalizers(_normalizer({"dataset": {"train": train}}), {})
    assert [line.split()[0] for line in lines] == ["energy", "forces"]
    assert all("fitted to the data" in line for line in lines)
    _, notes = compare_normalizers({"energy": {"stdev": 1.0}}, {"energy": {"rmsd": 23.06}})
    assert "differ by a factor of 0.0434" in notes[0]


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


def test_how_forces_are_made_is_named() -> None:
    """EquiformerV2 and eSCN have a head for them; DimeNet++ and SchNet have none."""
    block = {"use_pbc": True, "regress_forces": True, "otf_graph": True}
    small = {"sphere_channels": 4, "edge_channels": 4, "num_layers": 1, "num_sphere_samples": 8}
    small |= {"lmax_list": [1], "mmax_list": [1]}
    hidden = {"hidden_channels": 8, "out_emb_channels": 8, "num_blocks": 1}
    hidden |= {"num_spherical": 2, "num_radial": 2}  # SymPy works out each of them
    models = {
        "direct": {"name": "escn", "hidden_channels": 4, **small},
        "gradient": {"name": "dimenetplusplus", **hidden},
    }
    for expected, options in models.items():
        assert facts(build_model({**block, **options}, fitted=False))["forces"] == expected
    assert facts(small_model("schnet"))["forces"] == "gradient"
    assert facts(small_model("painn_hydra"))["forces"] == "direct"
    assert facts(small_model("painn_energy"))["forces"] == "none"


def test_strange_normalizers_are_named() -> None:
    lines, notes = compare_normalizers(
        {"energy": {"mean": 0.0, "rmsd": 1.0}, "forces": {"fit": True}},
        {"energy": {"mean": 0.0, "rmsd": 23.06}},
    )
    assert len(lines) == 2
    assert "fitted to the data" in lines[1]
    assert len(notes) == 1
    assert "differ by a factor of 0.0434" in notes[0]
