"""DistillationTrainer: equal to stock without distillation, right with it, and exact on resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import (
    assert_equal,
    assert_same,
    config,
    trainer,
    weights,
    write_lmdb,
    write_teacher,
)

from fairchem_kd.checkpoint import read_checkpoint
from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.records import read_records
from fairchem_kd.teacher import Teacher
from fairchem_kd.trainer import STATE_KEY, DistillationTrainer
from fairchem_kd.workarounds import with_primary_metric

FEATURE_LOSSES: dict[str, Any] = {"n2n": {}, "e2n": {}, "v2v": {}}
ALL_LOSSES = {**FEATURE_LOSSES, "vanilla": {}, "per_atom_energy": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_lmdb(root / "train", 11, seed=0)
    write_lmdb(root / "val", 4, seed=50)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"), data)


def trained(arguments: dict[str, Any], cls: type[OCPTrainer] = DistillationTrainer) -> dict:
    with trainer(arguments, cls) as built:
        built.train(disable_eval_tqdm=True)
        return weights(built)


# -- stock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["painn", "schnet", "gemnet_oc"])
def test_with_every_coefficient_0_training_is_stock(
    tmp_path: Path, data: Path, teacher: Path, model: str
) -> None:
    losses = {"n2n": {"coefficient": 0}, "e2n": {"coefficient": 0.0}}
    plain = {"flush_denormal": False}
    ours = config(tmp_path / "a", data, model=model, losses=losses, distillation=plain)
    ours["task"]["distillation"]["teacher"]["checkpoint"] = str(teacher)
    stock = config(tmp_path / "b", data, model=model)
    assert_equal(trained(ours), trained(stock, OCPTrainer))


def test_with_a_live_teacher_and_a_vanishing_loss_training_is_stock(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Setting up and running distillation draws no random numbers and touches no batch."""
    losses = {name: {"coefficient": 1e-30} for name in ALL_LOSSES}
    plain = {"flush_denormal": False}
    arguments = config(tmp_path / "a", data, teacher=teacher, losses=losses, distillation=plain)
    assert_equal(trained(arguments), trained(config(tmp_path / "b", data), OCPTrainer))


def test_a_checkpoint_is_a_stock_checkpoint(tmp_path: Path, data: Path, teacher: Path) -> None:
    losses = FEATURE_LOSSES
    arguments = config(tmp_path / "a", data, teacher=teacher, losses=losses, checkpoint_every=4)
    arguments["model"]["name"] = "painn_kd"
    arguments["model"]["features"] = ["node"]
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        final, ema = weights(built), [p.clone() for p in built.ema.shadow_params]
    with trainer(config(tmp_path / "b", data), OCPTrainer) as stock:
        for name in ("checkpoint.pt", "best_checkpoint.pt"):
            contents = read_checkpoint(folder / name)
            assert contents["config"]["trainer"] == "ocp"
            assert contents["config"]["model"]["name"] == "painn"
            assert "features" not in contents["config"]["model"]
            assert contents["state_dict"].keys() == final.keys()
        assert STATE_KEY not in contents
        path = folder / "checkpoint.pt"
        stock.load_checkpoint(str(path), read_checkpoint(path))
        assert_equal(weights(stock), final)
        for mine, theirs in zip(stock.ema.shadow_params, ema, strict=True):
            assert torch.equal(mine, theirs)
        stock.config["optim"]["max_epochs"] = 3
        stock.train(disable_eval_tqdm=True)  # fine-tunes: optimiser and scheduler are its own
        assert stock.step == 12


# -- the losses in the trainer --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["n2n", "e2n", "v2v"])
@pytest.mark.parametrize("model", ["painn", "gemnet_oc"])
def test_one_step_has_the_loss_of_the_formula(
    tmp_path: Path, data: Path, teacher: Path, kind: str, model: str
) -> None:
    options = {"coefficient": 3.0, "schedule": {"warmup_steps": 4}}
    if kind == "v2v" and model == "gemnet_oc":
        options["student"] = "vector@1"
    arguments = config(tmp_path, data, model=model, teacher=teacher, losses={kind: options})
    with trainer(arguments) as built:
        built._set_up_distillation()
        built.step = 2  # half-way through the warm-up
        built.model.train()
        batch = next(iter(built.train_loader))
        loss = built._compute_loss(built._forward(batch), batch)
        term = built.distillation.terms[kind]
        model_t = Teacher.from_checkpoint(str(teacher)).model
        student = values_of(built._unwrapped_model, term.student_request, batch)
        taught = values_of(model_t, term.teacher_request, batch)
        seen = torch.cat(
            [
                values_of(model_t, term.teacher_request, built.collater([built.train_dataset[i]]))
                for i in (0, 1, 2, 4, 5, 6, 8, 9)  # 8 of 11, evenly spread
            ]
        ).double()
        if kind == "v2v":
            taught = taught / seen.square().mean((0, 1)).sqrt()
            student = student @ term.projection.weight.T.double()
        else:
            taught = (taught - seen.mean(0)) / seen.std(0, unbiased=False)
            student = student @ term.projection.weight.T.double() + term.projection.bias.double()
        expected = 3.0 * 0.5 * (student - taught).square().mean()
        with torch.no_grad():
            labels = OCPTrainer._compute_loss(built, OCPTrainer._forward(built, batch), batch)
    assert loss.item() - labels.item() == pytest.approx(expected.item(), rel=2e-4)


def values_of(model: torch.nn.Module, request: Request, batch: Any) -> torch.Tensor:
    tap = FeatureExtractor(model, [request])
    with tap.capture(detach=True) as captured:
        model(batch)
    return captured[request].values.double()


def test_outputs_of_teacher_and_student_are_compared_in_physical_units(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    losses = {"vanilla": {"energy": 3.0, "forces": 5.0}, "per_atom_energy": {"coefficient": 7.0}}
    arguments = config(tmp_path, data, teacher=teacher, losses=losses)
    with trainer(arguments) as built:
        built._set_up_distillation()
        built.model.train()
        batch = next(iter(built.train_loader))
        out = built._forward(batch)
        loss = built._compute_loss(out, batch)
        values = built.distillation.read_values()
        model_t = Teacher.from_checkpoint(str(teacher)).model
        with torch.no_grad():
            labels = OCPTrainer._compute_loss(built, OCPTrainer._forward(built, batch), batch)
            taught = model_t(batch)
        atoms_s = values_of(built._unwrapped_model, Request("atom_energy", "node"), batch)
        atoms_t = values_of(model_t, Request("atom_energy", "node"), batch)
    # student: E = 2 e + 10, F = 1.5 f; teacher: E = 3 e + 8, F = 2 f
    energy = ((3 * taught["energy"] + 8) - (2 * out["energy"].squeeze(1) + 10)).abs().mean() / 2
    free = batch.fixed == 0
    forces = (2 * taught["forces"] - 1.5 * out["forces"])[free].norm(dim=1).mean() / 1.5
    natoms = batch.natoms[batch.batch].double()[:, None]
    atom = ((3 * atoms_t + 8 / natoms) - (2 * atoms_s + 10 / natoms)).abs().mean() / 2
    assert values["vanilla.energy"] == pytest.approx(energy.item(), rel=1e-5)
    assert values["vanilla.forces"] == pytest.approx(forces.item(), rel=1e-5)
    assert values["per_atom_energy"] == pytest.approx(atom.item(), rel=1e-5)
    expected = 3 * energy + 5 * forces + 7 * atom
    assert loss.item() - labels.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "losses"),
    [
        ("painn", ALL_LOSSES),
        ("painn_gradient", ALL_LOSSES),
        ("schnet", {k: v for k, v in ALL_LOSSES.items() if k != "v2v"}),
        ("gemnet_oc", {**ALL_LOSSES, "early": {"kind": "n2n", "student": "node@1+2"}}),
    ],
)
def test_every_loss_trains_every_student(
    tmp_path: Path, data: Path, teacher: Path, student: str, losses: dict[str, Any]
) -> None:
    arguments = config(tmp_path, data, model=student, teacher=teacher, losses=losses, max_epochs=1)
    arguments["task"]["distillation"]["validate"] = True
    with trainer(arguments) as built:
        start = weights(built)
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        assert all(p.grad is not None for p in built.distillation.parameters)
        assert not any(p.requires_grad for p in built.distillation.teacher.model.parameters())
        assert any(not torch.equal(v, start[k]) for k, v in weights(built).items())
        assert built._distilled is None
    records = read_records(folder)
    assert [r["kind"] for r in records] == ["config", "train", "train", "train", "val", "train"]
    names = {n for n in losses if n != "vanilla"} | {"vanilla.energy", "vanilla.forces"}
    for record in records[1:]:
        metrics = record["metrics"]
        for name in names:
            assert metrics[name] > 0
            weighted = metrics[f"{name}_weighted"] / metrics[name]
            term = built_coefficient(name, losses)
            assert weighted == pytest.approx(term, rel=1e-4)
        assert {"loss", "forces_mae"} <= metrics.keys()
    assert records[0]["config"]["task"]["distillation"]["losses"].keys() == losses.keys()


def built_coefficient(name: str, losses: dict[str, Any]) -> float:
    """Default coefficient of a part: vanilla's are those of the training loss, 2 and 10."""
    from fairchem_kd.losses import DEFAULT_COEFFICIENTS

    kind, _, part = name.partition(".")
    kind = losses[kind].get("kind", kind)
    return DEFAULT_COEFFICIENTS[kind] * {"energy": 2.0, "forces": 10.0}.get(part, 1.0)


def test_the_projections_learn_and_follow_the_students_schedule(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    arguments["task"]["distillation"]["projections"] = {"lr": 0.1, "clip_grad_norm": 0.5}
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        (group,) = built.distillation.optimizer.param_groups
        # the rate that the last step was taken with: after 3 of 8 cosine steps
        rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 8)).item())
        assert group["lr"] == pytest.approx(0.1 * rate, rel=1e-6)
        grads = torch.cat([p.grad.flatten() for p in built.distillation.parameters])
        assert grads.norm().item() == pytest.approx(0.5, rel=1e-4)  # clipped, by itself
        first = built.distillation.terms["n2n"].projection.weight
        other = config(tmp_path / "b", data, teacher=teacher, losses={"n2n": {}})
        assert first.abs().sum() > 0
    with trainer(other) as fresh:
        fresh._set_up_distillation()
        assert not torch.equal(fresh.distillation.terms["n2n"].projection.weight, first)


def test_fine_tuning_a_trained_student_starts_with_its_weights(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with trainer(config(tmp_path / "a", data), OCPTrainer, seed=11) as stock:
        stock.train(disable_eval_tqdm=True)
        path = stock.save(checkpoint_file="student.pt", training_state=False)
        expected = weights(stock)
    arguments = config(tmp_path / "b", data, teacher=teacher, losses={"e2n": {}})
    with trainer(arguments) as built:
        built.load_checkpoint(path)
        # EMA's weights were saved; the file has no EMA state, which stock takes as EMA switched off
        assert built.ema is not None
        trained = [p for p in built.model.parameters() if p.requires_grad]
        for shadow, weight in zip(built.ema.shadow_params, trained, strict=True):
            assert torch.equal(shadow, weight)
        assert weights(built).keys() == expected.keys()
        assert built.step == 0
        built.train(disable_eval_tqdm=True)
        assert built.step == 8


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the trainer's autocast is CUDA's
def test_projections_follow_the_amp_scaler(tmp_path: Path, data: Path, teacher: Path) -> None:
    """Scaled, they end as without a scaler; where the scaler skips a step, they skip it too."""
    results = []
    for scaled in (False, True):
        arguments = config(tmp_path, data, teacher=teacher, losses=FEATURE_LOSSES, max_epochs=1)
        with trainer(arguments) as built:
            if scaled:
                built.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            built.train(disable_eval_tqdm=True)
            projections = dict(built.distillation.modules.named_parameters())
            ended = {k: v.detach().clone() for k, v in projections.items()}
            results.append({**weights(built), **ended})
            if scaled:
                batch = next(iter(built.train_loader))
                loss = built._compute_loss(built._forward(batch), batch)
                built._backward(built.scaler.scale(loss * float("inf")))
                assert_equal(ended, {k: v.detach() for k, v in projections.items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


# -- resume ---------------------------------------------------------------------------------------


class Keeping(DistillationTrainer):
    """Keeps a copy of every step's checkpoint, as a run killed right after it would leave it."""

    def save(self, *args: Any, **kwargs: Any) -> str | None:
        path = super().save(*args, **kwargs)
        if path is not None and path.endswith("/checkpoint.pt"):
            shutil.copy(path, Path(path).with_name(f"step{self.step}.pt"))
        return path


@pytest.mark.parametrize("scheduler", ["CosineAnnealingLR", "ReduceLROnPlateau"])
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    tmp_path: Path, data: Path, teacher: Path, scheduler: str
) -> None:
    losses = {"n2n": {"schedule": {"decay": "cosine"}}, "v2v": {}}
    arguments = config(
        tmp_path, data, teacher=teacher, losses=losses, scheduler=scheduler, checkpoint_every=1
    )
    arguments["optimizer"].update({"mode": "min", "factor": 0.5, "patience": 0})
    with trainer(arguments, Keeping) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
        expected = read_checkpoint(folder / "checkpoint.pt")
        best = read_checkpoint(folder / "best_checkpoint.pt")
        final_rate = built.scheduler.get_lr()
    for step in (2, 3, 4, 6):  # mid-epoch; before a validation; end of an epoch; both
        run = folder.with_name(f"resumed{step}")
        run.mkdir()
        shutil.copy(folder / f"step{step}.pt", run / "checkpoint.pt")
        if step > 3:
            shutil.copy(folder / "best_checkpoint.pt", run)
        with trainer(arguments, timestamp_id=run.name) as resumed:
            torch.manual_seed(step)  # another process has another random state
            resumed.load_checkpoint(str(run / "checkpoint.pt"))
            assert resumed.step == step
            resumed.train(disable_eval_tqdm=True)
            assert resumed.scheduler.get_lr() == final_rate
        ended = read_checkpoint(run / "checkpoint.pt")
        for key in ("state_dict", "optimizer", "ema", STATE_KEY, "scheduler", "best_val_metric"):
            assert_same(ended[key], expected[key], f"step {step}: {key}")
        ended = read_checkpoint(run / "best_checkpoint.pt")
        assert_same(ended["state_dict"], best["state_dict"], f"step {step}: best")


def test_the_runs_own_checkpoint_goes_before_the_one_given(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = config(
        tmp_path, data, teacher=teacher, losses={"n2n": {}}, checkpoint_every=2, max_epochs=1
    )
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        name = built.timestamp_id
        final = weights(built)
        best = Path(built.config["cmd"]["checkpoint_dir"]) / "best_checkpoint.pt"
    with trainer(arguments, timestamp_id=name) as resumed:
        resumed.load_checkpoint(str(best))  # what --checkpoint says, in training
        resumed.train(disable_eval_tqdm=True)
        assert resumed.step == 4
        assert_equal(weights(resumed), final)
    with trainer(arguments, timestamp_id=name) as resumed:
        resumed.load_checkpoint(str(best))  # and in validation, where it is what counts
        assert_equal(weights(resumed), dict(read_checkpoint(best)["state_dict"]))


def test_a_run_never_resumes_a_folder_by_accident(tmp_path: Path, data: Path) -> None:
    names = []
    for _ in range(3):
        with trainer(config(tmp_path, data)) as built:
            names.append(built.timestamp_id)
    assert len(set(names)) == 3


def test_resuming_with_other_losses_is_refused(tmp_path: Path, data: Path, teacher: Path) -> None:
    arguments = config(tmp_path, data, teacher=teacher, losses={"n2n": {}}, max_epochs=1)
    with trainer(arguments) as built:
        built.train(disable_eval_tqdm=True)
        name, path = built.timestamp_id, built.save()
    other = config(tmp_path, data, teacher=teacher, losses={"e2n": {}})
    with trainer(other, timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match=r"distillation\.losses: this run was started with"):
            resumed.train(disable_eval_tqdm=True)
    for change in ({"teacher": "node@1"}, {"student": "node@2"}, {"atoms": "free"}):
        same_shapes = config(tmp_path, data, teacher=teacher, losses={"n2n": change})
        with trainer(same_shapes, timestamp_id=name) as resumed:
            resumed.load_checkpoint(path)
            with pytest.raises(UserError, match=r"distillation\.losses"):
                resumed.train(disable_eval_tqdm=True)
    another = write_teacher(tmp_path / "another", data, seed=8)
    taught = config(tmp_path, data, teacher=another, losses={"n2n": {}})
    with trainer(taught, timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match=r"distillation\.teacher"):
            resumed.train(disable_eval_tqdm=True)
    with trainer(config(tmp_path, data), timestamp_id=name) as resumed:
        resumed.load_checkpoint(path)
        with pytest.raises(UserError, match="losses is empty"):
            resumed.train(disable_eval_tqdm=True)
    with trainer(other) as fresh:  # as --checkpoint of a new run: fresh projections
        fresh.load_checkpoint(path)
        fresh.train(disable_eval_tqdm=True)
        assert list(fresh.distillation.terms) == ["e2n"]


def test_a_newer_format_is_refused(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data)) as built:
        contents = read_checkpoint(built.save())
        contents[STATE_KEY]["format"] += 1
        with pytest.raises(UserError, match="newer fairchem-kd"):
            built.load_checkpoint("x.pt", contents)


def test_records_are_json_lines(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data, max_epochs=1)) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2, 3, 4]
    assert all(r["lr"] > 0 for r in lines if r["kind"] == "train")


def test_a_primary_metric_is_found_where_none_is_given() -> None:
    """Stock fails at the first evaluation without one."""
    both = {"energy": {}, "forces": {}}
    found = with_primary_metric(None, both)
    assert found == {
        "metrics": {"energy": ["mae"], "forces": ["mae"]}, "primary_metric": "forces_mae"
    }  # fmt: skip
    given = {"metrics": {"energy": ["mae", "mse"], "forces": ["cosine_similarity"]}}
    assert with_primary_metric(given, both) == {**given, "primary_metric": "energy_mae"}
    chosen = {**given, "primary_metric": "energy_mse"}
    assert with_primary_metric(chosen, both) == chosen
    assert "primary_metric" not in given
