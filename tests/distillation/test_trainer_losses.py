"""The losses in a training: their values, their records, and that each trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.trainers import OCPTrainer
from trainings import ALL_LOSSES, config, trainer, weights
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.models.frozen import Teacher
from fairchem_kd.training.records import read_records


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
        built.set_up()
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
        built.set_up()
        built.model.train()
        batch = next(iter(built.train_loader))
        out = built._forward(batch)
        loss = built._compute_loss(out, batch)
        values = built.distillation.values.read()
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
        assert all(p.grad is not None for p in built.projections.parameters)
        assert not any(
            p.requires_grad for p in built.distillation.teacher.live.frozen.model.parameters()
        )
        assert any(not torch.equal(v, start[k]) for k, v in weights(built).items())
        assert built.distiller.watched is None
    records = read_records(folder)
    kinds = ["config", "train", "train", "train", "val", "train", "end"]
    assert [r["kind"] for r in records] == kinds
    names = {n for n in losses if n != "vanilla"} | {"vanilla.energy", "vanilla.forces"}
    for record in records[1:-1]:
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
    from fairchem_kd.losses import known_losses

    kind, _, part = name.partition(".")
    kind = losses[kind].get("kind", kind)
    return known_losses()[kind].default_coefficient * {"energy": 2.0, "forces": 10.0}.get(part, 1.0)


def test_records_are_json_lines(tmp_path: Path, data: Path) -> None:
    with trainer(config(tmp_path, data, max_epochs=1)) as built:
        built.train(disable_eval_tqdm=True)
        folder = Path(built.config["cmd"]["checkpoint_dir"])
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2, 3, 4]
    assert all(r["lr"] > 0 for r in lines if r["kind"] == "train")
