"""Rattled copies and unlabelled structures in a training: what each loss sees of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from models import model_config
from trainings import config, trainer, write_lmdb, write_splits
from trainings import teacher as teacher

from fairchem_kd.errors import UserError
from fairchem_kd.stock.structures import join
from fairchem_kd.training.records import read_records

LOSSES: dict[str, Any] = {"e2n": {}, "v2v": {}, "vanilla": {}, "per_atom_energy": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_splits(root, train=(6, 0), more=(10, 20), val=(4, 50))


def distilled(root: Path, data: Path, teacher: Path, **block: Any) -> dict[str, Any]:
    return config(root, data, teacher=teacher, losses=LOSSES, distillation=block)


def first_batch(built: Any) -> Any:
    """The batch of the first step, for which the trainer is ready then."""
    built.train_sampler.set_epoch_and_start_iteration(0, 0)
    built.set_up()
    built.model.train()
    built.step = 1
    return next(iter(built.train_loader))


def first_losses(arguments: dict[str, Any]) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Label loss, raw distillation losses, gradients: all of the first step."""
    with trainer(arguments) as built:
        batch = first_batch(built)
        out = built._forward(batch)
        taught, built.distiller.watched = built.distiller.watched, None
        label = built._compute_loss(out, batch).item()
        distillation = built.distillation
        inputs = distillation.compared(*taught).inputs
        parts = {
            f"{name}.{part.name}": (part.total.item(), float(part.count))
            for name, term in distillation.terms.items()
            for part in term(inputs)
        }
        structures = {key: taught[0][key].clone() for key in ("pos", "natoms")}
        return label, parts, {**structures, "energy": out["energy"].detach().clone()}


UNLABELLED = {"share": 0.5, "skip": 2}


def test_the_label_loss_is_unchanged_by_companions(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, **UNLABELLED}
    plain = first_losses(distilled(tmp_path / "a", data, teacher))
    extended = first_losses(
        distilled(tmp_path / "b", data, teacher, rattle={"copies": 1}, unlabelled=more)
    )
    assert extended[0] == pytest.approx(plain[0], rel=1e-5)
    assert (len(plain[2]["natoms"]), len(extended[2]["natoms"])) == (3, 12)
    assert extended[2]["energy"].shape == plain[2]["energy"].shape
    torch.testing.assert_close(extended[2]["energy"], plain[2]["energy"])


def test_a_batch_with_copies_is_the_sum_of_its_parts(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Totals and counts of clean structures and copies add up to those of the joined batch."""
    arguments = distilled(tmp_path, data, teacher, rattle={"copies": 1})
    with trainer(arguments) as built:
        batch = first_batch(built)
        clean = join([batch])
        copies = built.companions.rattler(batch, 1)
        sums: dict[str, list[Any]] = {}
        for one in (join([clean, copies]), clean, copies):
            with built.distillation.tap_student() as features:
                out = OCPTrainer._forward(built, one)
            for name, term in built.distillation.terms.items():
                for part in term(built.distillation.compared(one, out, features).inputs):
                    sums.setdefault(f"{name}.{part.name}", []).append(
                        (part.total.item(), float(part.count))
                    )
    assert len(sums) == 5
    for name, (whole, *parts) in sums.items():
        assert whole[0] == pytest.approx(sum(total for total, _ in parts), rel=1e-4), name
        assert whole[1] == sum(count for _, count in parts), name


def test_copies_above_the_teachers_force_limit_do_not_count(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    plain = first_losses(distilled(tmp_path / "a", data, teacher))
    none_kept = {"copies": 1, "max_force": 1e-9}
    kept = first_losses(distilled(tmp_path / "b", data, teacher, rattle=none_kept))
    assert len(kept[2]["natoms"]) == 6
    for name, (total, count) in plain[1].items():
        assert kept[1][name] == (pytest.approx(total, rel=1e-4), count), name


def test_unlabelled_labels_are_never_read(tmp_path: Path, data: Path, teacher: Path) -> None:
    """A run with absurd labels on the unlabelled structures is the same run, bit for bit."""
    write_lmdb(tmp_path / "absurd", 10, seed=20, energy=lambda e, i: 1e6, forces=lambda f, i: f * 0)
    final = []
    for number, src in enumerate((data / "more", tmp_path / "absurd")):
        more = {"dataset": {"format": "lmdb", "src": str(src)}, "share": 0.4}
        block = {"rattle": {"copies": 0.5}, "unlabelled": more}
        with trainer(distilled(tmp_path / f"run{number}", data, teacher, **block)) as built:
            built.train(disable_eval_tqdm=True)
            final.append(copy.deepcopy(built._unwrapped_model.state_dict()))
            records = read_records(built.config["cmd"]["checkpoint_dir"])
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())
    steps = [record["metrics"] for record in records if record["kind"] == "train"]
    assert {step["rattle"] for step in steps} == {1.0}


def test_resume_with_companions_equals_the_uninterrupted_run(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, "share": 0.4}
    block = {"rattle": {"copies": 0.5}, "unlabelled": more}
    arguments = distilled(tmp_path, data, teacher, **block)
    arguments["optimizer"] |= {"max_epochs": 4, "checkpoint_every": 3, "T_max": 8}
    with trainer(arguments, timestamp_id="whole") as built:
        built.train(disable_eval_tqdm=True)
        expected = copy.deepcopy(built._unwrapped_model.state_dict())
    with trainer(arguments, timestamp_id="broken") as built:
        built.config["optim"]["max_epochs"] = 2  # 4 of 8 steps, the last save after 3
        built.train(disable_eval_tqdm=True)
    with trainer(arguments, timestamp_id="broken") as built:
        built.train(disable_eval_tqdm=True)
        resumed = built._unwrapped_model.state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_elements_that_the_teacher_does_not_know_are_refused_before_training(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    write_lmdb(tmp_path / "gold", 4, seed=9, atomic_numbers=lambda z, i: z * 0 + 94)
    more = {"dataset": {"format": "lmdb", "src": str(tmp_path / "gold")}}
    with (
        trainer(distilled(tmp_path / "run", data, teacher, unlabelled=more)) as built,
        pytest.raises(UserError, match=r"unlabelled.dataset: The data holds Pu.*does not know"),
    ):
        built.train(disable_eval_tqdm=True)


def test_the_labelled_lmdb_cannot_be_the_unlabelled_one_too(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    more = {"dataset": {"format": "lmdb", "src": str(data / "train")}}
    arguments = distilled(tmp_path, data, teacher, unlabelled=more)
    with pytest.raises(UserError, match=r"unlabelled.dataset.src and dataset.train.src are both"):
        trainer(arguments).__enter__()


def test_a_hydra_student_has_companions(tmp_path: Path, data: Path, teacher: Path) -> None:
    """Its backbone makes the graph, and has the switch."""
    more = {"dataset": {"format": "lmdb", "src": str(data / "more")}, **UNLABELLED}
    arguments = distilled(tmp_path, data, teacher, rattle={"copies": 1}, unlabelled=more)
    arguments["model"] = model_config("painn_hydra")
    _, _, extended = first_losses(arguments)
    assert len(extended["natoms"]) == 12
    arguments["model"]["backbone"]["otf_graph"] = False
    with trainer(arguments) as built, pytest.raises(UserError, match=r"model\.backbone\.otf_graph"):
        built.set_up()


@pytest.mark.parametrize("name", ["lmdb", "trajectory_lmdb"])
def test_one_lmdb_under_another_format_is_noticed(
    tmp_path: Path, data: Path, teacher: Path, name: str
) -> None:
    """fairchem has three names for the format."""
    more = {"dataset": {"format": name, "src": str(data / "train" / "data.0000.lmdb")}}
    arguments = distilled(tmp_path, data, teacher, unlabelled=more)
    arguments["dataset"]["train"]["format"] = "trajectory_lmdb"
    with pytest.raises(UserError, match="can open an LMDB only once"):
        trainer(arguments).__enter__()


def test_a_graph_from_the_data_set_is_refused(tmp_path: Path, data: Path, teacher: Path) -> None:
    arguments = distilled(tmp_path, data, teacher, rattle={})
    arguments["model"]["otf_graph"] = False
    with (
        trainer(arguments) as built,
        pytest.raises(UserError, match=r"need model\.otf_graph: true"),
    ):
        built.set_up()
