"""Trainings that compare how forces change: real models, from stores too, gone on from, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, small_model, structures
from trainings import assert_equal, config, trainer, weights, write_teacher
from trainings import data as data

from fairchem_kd import Distiller
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.distillation.slopes import check_slopes_on
from fairchem_kd.errors import UserError
from fairchem_kd.teachers.recorded import RecordedTeacher
from fairchem_kd.teachers.slopes import force_slopes, live_members
from fairchem_kd.teachers.stored import StoredTeacher
from fairchem_kd.training.records import read_records

BOTH = {"jacobian": {}, "jacobian_antithetic": {}}
PAIRS = {"copies": 1, "std": 0.02, "antithetic": True, "pool": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A small PaiNN with forces of its own."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), data, "painn")


def test_both_losses_train_from_a_store_and_go_on_bit_for_bit(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    given = config(
        tmp_path, data, teacher=teacher, losses=BOTH, distillation={"rattle": PAIRS},
        max_epochs=2, checkpoint_every=3, batch_size=4,
    )  # fmt: skip
    given["model"]["num_layers"] = 2
    with trainer(given, timestamp_id="whole") as built:
        built.train(disable_eval_tqdm=True)
        whole = weights(built)
        place = built.config["cmd"]["checkpoint_dir"]
        stored = built.distillation.teacher
        assert isinstance(stored, StoredTeacher)
        # and the teacher's own slopes are those of its forces
        batch = built.collater([built.train_dataset[i] for i in range(2)])
        cotangent, along = (
            torch.randn(batch.pos.shape, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 1)
        )
        (slope,) = force_slopes(stored, batch, [cotangent])
        ends = []
        for sign in (1, -1):
            moved = batch.clone()
            moved.pos = batch.pos + sign * 5e-3 * along
            ends.append(stored.live.teach(moved, ()).outputs["forces"])
        change = float(((ends[0] - ends[1]) / 1e-2 * cotangent).sum())
        assert float((slope * along).sum()) == pytest.approx(change, rel=0.03)
    steps = [r["metrics"] for r in read_records(Path(place)) if r["kind"] == "train"]
    assert all(step["jacobian"] > 0 and step["jacobian_antithetic"] > 0 for step in steps)
    with trainer(given, timestamp_id="broken") as built:
        built.config["optim"]["max_epochs"] = 1
        built.train(disable_eval_tqdm=True)
    with trainer(given, timestamp_id="broken") as built:
        built.train(disable_eval_tqdm=True)
        assert_equal(weights(built), whole)


@pytest.mark.parametrize("model", ["painn", "painn_hydra", "gemnet_oc"])
def test_an_atom_without_neighbours_has_slopes_of_nothing(model: str) -> None:
    """Such as leave a surface: of norms of vectors that are 0 autograd has no second derivative."""
    slab = structures(1)[0]
    slab.cell[2, 2] = 40.0
    slab.positions[-1, 2] += 15.0
    far = batch([slab])
    student = small_model(model, seed=1)
    before = student(far.clone())["forces"].detach()
    distiller = Distiller(student, small_model("painn"), {"jacobian": {}, "antisymmetric": {}})
    with distiller.watch(far):
        student(far)
    distiller.loss().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)
    torch.testing.assert_close(student(far)["forces"].detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher"), [("esen_hydra_gradient", "painn"), ("painn", "esen_hydra_gradient")]
)
def test_gradient_forces_of_esen_have_slopes(student: str, teacher: str) -> None:
    """In an evaluation too, which the teacher and the look before the first step are."""
    models = small_model(student, seed=1), small_model(teacher)
    distiller = Distiller(*models, {"jacobian": {}})
    given = batch()
    with distiller.watch(given):
        models[0](given)
    loss = distiller.loss()
    loss.backward()
    assert loss.item() > 0
    gradients = [p.grad for p in models[0].parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert not any(module.training for module in models[1].modules())  # as it was


def test_an_evaluation_has_no_slopes_and_no_pairs_and_so_no_values_of_them() -> None:
    student = small_model("painn", seed=1)
    losses = {"vanilla": {}, "jacobian": {}, "jacobian_antithetic": {}, "antisymmetric": {}}
    for given, names in ((losses, {"vanilla"}), (["jacobian"], set())):
        distiller = Distiller(student.eval(), small_model("painn"), given)
        with torch.no_grad(), distiller.watch(batch()):
            student(batch())
        assert (distiller.loss() > 0) == bool(names)
        assert {
            name.partition(".")[0].removesuffix("_weighted") for name in distiller.values()
        } == names


def test_gradient_forces_of_esen_are_a_slope_already() -> None:
    with pytest.raises(UserError, match=r"antisymmetric lessens .* the student's are a slope"):
        Distiller(small_model("esen_hydra_gradient"), small_model("painn"), ["antisymmetric"])


@pytest.mark.parametrize("model", ["equiformer_v2", "escn"])
def test_a_student_that_detaches_its_frames_is_refused(
    tmp_path: Path, data: Path, teacher: Path, model: str
) -> None:
    given = config(tmp_path, data, model=model, teacher=teacher, losses={"jacobian": {}})
    with trainer(given) as built, pytest.raises(UserError, match="student's forces do not change"):
        built.set_up()


def test_neighbours_that_are_as_near_are_no_reason_to_refuse(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Of 10 neighbours in a lattice that is held, any step exchanges some: forces jump there."""
    given = config(tmp_path, data, teacher=teacher, losses={"jacobian": {}})
    given["model"]["max_neighbors"] = 10
    slabs = structures(4)
    for slab, ideal in zip(slabs, structures(4, std=0.0), strict=True):
        held = slab.constraints[0].index
        slab.positions[held] = ideal.positions[held]
    with trainer(given) as built:
        built.set_up()
        check_slopes_on(batch(slabs), built.distillation)


def test_a_store_alone_has_no_slopes() -> None:
    with pytest.raises(UserError, match="jacobian take jacobian_antithetic"):
        live_members(RecordedTeacher.__new__(RecordedTeacher))


@pytest.mark.parametrize(
    "rattle", [None, {"copies": 1}, {"copies": 0, "antithetic": True}], ids=str
)
def test_pairs_need_pairs(rattle: Any) -> None:
    block = {"teacher": {"checkpoint": "t.pt"}, "losses": {"jacobian_antithetic": {}}}
    with pytest.raises(UserError, match=r"rattle: \{antithetic: true\}, with copies above 0"):
        parse_distillation({"distillation": {**block, "rattle": rattle}})


def test_half_precision_is_refused(tmp_path: Path, data: Path, teacher: Path) -> None:
    given = config(tmp_path, data, teacher=teacher, losses={"jacobian": {}})
    with trainer(given) as built:
        built.scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(UserError, match="amp: true and a loss on slopes"):
            built.make_distillation()
