"""`Distiller`: the losses in a loop of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from fairchem.core.datasets import data_list_collater
from fairchem.core.modules.normalization.normalizer import create_normalizer
from fairchem.core.trainers import OCPTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from trainings import assert_same, config, start_ranks, trainer
from trainings import data as data
from trainings import teacher as teacher

from fairchem_kd import Distiller, Teacher, UserError
from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.models.units import Units
from fairchem_kd.teachers import LiveTeacher
from fairchem_kd.training import ranks

FEATURES = {"n2n": {}, "e2n": {}, "v2v": {}}
PLAIN = {"n2n": {"standardize": False}}


def painn(**overrides: Any) -> nn.Module:
    return models.small_model("painn", **overrides)


def gemnet() -> nn.Module:
    return models.small_model("gemnet_oc", seed=3)


def fitted(student: nn.Module, losses: Any, teacher: Any = None, **more: Any) -> Distiller:
    distiller = Distiller(student, gemnet() if teacher is None else teacher, losses, **more)
    distiller.fit([models.batch()])
    return distiller


def watched(distiller: Distiller, student: nn.Module, batch: Any = None) -> torch.Tensor:
    batch = models.batch() if batch is None else batch
    with distiller.watch(batch):
        student(batch)
    return distiller.loss()


# -- values ---------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_loop_over_atoms_and_channels() -> None:
    student, frozen = painn(), gemnet()
    distiller = fitted(student, {"n2n": {"coefficient": 3.0}, "vanilla": {}}, copy.deepcopy(frozen))
    loss = watched(distiller, student)

    batch = models.batch()
    request = [Request("node", "node")]
    with FeatureExtractor(student, request).capture() as ours:
        out = student(models.batch())
    with FeatureExtractor(frozen.eval(), request).capture() as theirs, torch.no_grad():
        said = frozen(models.batch())
    h, t = ours[request[0]].values.double(), theirs[request[0]].values.double()
    weight, bias = (p.detach().double() for p in distiller.parameters())
    if weight.dim() == 1:
        weight, bias = bias, weight
    total = 0.0
    for c in range(t.shape[1]):
        column = [float(x) for x in t[:, c]]
        mean = sum(column) / len(column)
        spread = (sum((x - mean) ** 2 for x in column) / len(column)) ** 0.5
        for i, x in enumerate(column):
            projected = float((weight[c] * h[i].detach()).sum() + bias[c])
            total += (projected - (x - mean) / spread) ** 2
    n2n = total / t.numel()
    energies = out["energy"].tolist(), said["energy"].tolist()
    difference = sum(abs(a - b) for a, b in zip(*energies, strict=True))
    free = [i for i in range(len(h)) if batch.fixed[i] == 0]
    forces = out["forces"].detach()
    lengths = [float((forces[i] - said["forces"][i]).double().norm()) for i in free]
    vanilla = difference / 3 + 100.0 * sum(lengths) / len(free)
    assert loss.item() == pytest.approx(3.0 * n2n + vanilla, rel=2e-4)
    noted = distiller.values()
    assert noted["n2n"] == pytest.approx(n2n, rel=2e-4)
    assert noted["n2n_weighted"] == pytest.approx(3 * n2n, rel=2e-4)
    assert noted["vanilla.energy"] == pytest.approx(difference / 3, rel=1e-4)
    assert distiller.values() == {}


def test_outputs_are_compared_in_the_units_of_the_student() -> None:
    student = painn()
    units = Units({"energy": create_normalizer(mean=5.0, rmsd=4.0)}, {})
    only = {"vanilla": {"targets": {"energy": 1.0}}}
    loss = watched(Distiller(student, gemnet(), only, units=units), student)
    ours = student(models.batch())["energy"].double()
    said = (gemnet().eval()(models.batch())["energy"].double() - 5.0) / 4.0
    assert loss.item() == pytest.approx((ours - said).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("student", ["painn", "schnet", "equiformer_v2"])
@pytest.mark.parametrize("teacher", ["gemnet_oc", "escn", "esen_hydra"])
def test_pairs_train_or_are_refused_with_the_reason(student: str, teacher: str) -> None:
    """Every loss of features and of outputs: two steps, finite gradients that reach the student."""
    model, frozen = models.small_model(student, seed=1), models.small_model(teacher, seed=2)
    losses: dict[str, Any] = {**FEATURES, "vanilla": {}, "per_atom_energy": {}}
    if student == "schnet":
        with pytest.raises(UserError, match="SchNet has no vectors"):
            Distiller(model, frozen, losses)
        del losses["v2v"]
    distiller = fitted(model, losses, frozen)
    optimizer = torch.optim.AdamW([*model.parameters(), *distiller.parameters()], 1e-3)
    for _ in range(2):
        loss = watched(distiller, model)
        optimizer.zero_grad()
        loss.backward()
        for parameter in distiller.parameters():
            assert parameter.grad is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)
        optimizer.step()
    assert all(p.grad is None for p in frozen.parameters())
    assert not frozen.training


def test_a_loop_of_ones_own_lowers_the_loss() -> None:
    student, batch = painn(), models.batch()
    distiller = fitted(student, FEATURES)
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], 1e-2)
    seen = []
    for _ in range(12):
        loss = watched(distiller, student, batch.clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]
    assert distiller.step == 12


def test_heads_of_a_hydra_are_found_by_property() -> None:
    student = models.small_model("painn_hydra", pass_through_head_outputs=False)
    outputs = {
        "energy": {"level": "system", "property": "energy"},
        "forces": {"level": "atom", "property": "forces"},
    }
    losses = {"vanilla": {}}
    loss = watched(Distiller(student, gemnet(), losses, outputs=outputs), student)
    flat = models.small_model("painn_hydra")
    assert loss.item() == watched(Distiller(flat, gemnet(), losses), flat).item()
    with pytest.raises(UserError, match="the student says that it predicts 'energy'"):
        watched(Distiller(student, gemnet(), losses), student)


def test_a_teacher_from_a_file_or_of_any_kind(teacher: Path) -> None:
    losses = []
    loaded = Teacher.from_checkpoint(teacher)
    for given in (teacher, str(teacher), loaded, LiveTeacher(loaded)):
        student = painn()
        losses.append(watched(fitted(student, ["n2n", "vanilla"], given), student).item())
    assert len(set(losses)) == 1


# -- what it leaves alone -------------------------------------------------------------------------


def test_student_and_global_random_numbers_stay_as_they_were() -> None:
    student = painn()
    names, hooks = list(student.state_dict()), len(student._forward_hooks)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    distiller = fitted(student, FEATURES)
    assert torch.equal(torch.rand(3), expected)
    watched(distiller, student)
    assert list(student.state_dict()) == names
    assert len(student._forward_hooks) == hooks
    with pytest.raises(ZeroDivisionError), distiller.watch(models.batch()):
        _ = 1 / 0
    assert len(student._forward_hooks) == hooks
    with pytest.raises(UserError, match="nothing to compare"):
        distiller.loss()


def test_projections_come_from_their_seed() -> None:
    first, second, third = (
        next(Distiller(painn(), gemnet(), PLAIN, seed=seed).parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# -- state and schedules --------------------------------------------------------------------------


def test_a_loop_goes_on_from_its_state(tmp_path: Path) -> None:
    schedule = {"warmup_steps": 2, "decay": "linear"}
    losses = {"n2n": {"schedule": schedule}, "v2v": {}}
    student = painn()
    distiller = fitted(student, losses, steps=10, seed=5)
    for _ in range(3):
        watched(distiller, student)
    torch.save(distiller.state_dict(), tmp_path / "state.pt")
    expected = watched(distiller, student)

    again = Distiller(student, gemnet(), losses, steps=10)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.step == 3
    assert torch.equal(watched(again, student), expected)
    assert again.step == 4

    other = Distiller(student, models.small_model("gemnet_oc", seed=4), losses, steps=10)
    with pytest.raises(UserError, match="started with another one"):
        other.load_state_dict(distiller.state_dict())
    for step in (-1, True, 1.5):
        with distiller.watch(models.batch()):
            student(models.batch())
        with pytest.raises(UserError, match="step is"):
            distiller.loss(step=step)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no state of a Distiller"):
        other.load_state_dict({"step": 3})


def test_coefficients_follow_their_schedule() -> None:
    student = painn()
    losses = {"n2n": {**PLAIN["n2n"], "schedule": {"warmup_steps": 4}}}
    distiller = Distiller(student, gemnet(), losses, steps=8)
    values = [watched(distiller, student).item() for _ in range(5)]
    assert values == pytest.approx([values[-1] * f for f in (0.25, 0.5, 0.75, 1, 1)], rel=1e-5)
    student.eval()
    watched(distiller, student)
    assert distiller.step == 5  # looking is no step


def test_what_is_no_batch_is_refused() -> None:
    batch = models.batch()
    distiller = Distiller(painn(), gemnet(), {"n2n": {}})
    with (
        pytest.raises(UserError, match="watch: this is a Data, and no batch"),
        distiller.watch(Data(natoms=3)),
    ):
        pass
    for given in (batch, [Data(natoms=3)]):  # one batch in place of several, structures
        with pytest.raises(
            UserError, match=r"fit takes several batches: this is a .*, and no batch"
        ):
            distiller.fit(given)


def test_where_every_term_has_ended_the_loss_is_0() -> None:
    student = painn()
    ends = {**PLAIN["n2n"], "schedule": {"stop": 0.25}}
    distiller = Distiller(student, gemnet(), {"n2n": ends}, steps=4)
    values = [watched(distiller, student).item() for _ in range(2)]
    assert values[0] > 0
    assert values[1] == 0


def test_values_of_a_term_are_means_over_the_steps_at_which_it_counts() -> None:
    student = painn()
    ends = {"kind": "n2n", "standardize": False, "schedule": {"stop": 0.25}}
    distiller = Distiller(student, gemnet(), {**PLAIN, "early": ends}, steps=8, seed=1)
    for _ in range(5):
        watched(distiller, student)
    told = distiller.values()
    watched(distiller, student)
    assert told["n2n"] == pytest.approx(distiller.values()["n2n"], rel=1e-5)
    again = Distiller(student, gemnet(), {**PLAIN, "early": ends}, steps=8, seed=1)
    watched(again, student)
    assert told["early"] == pytest.approx(again.values()["early"], rel=1e-5)  # of 2 steps of 5


def test_a_warm_up_beyond_the_training_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for steps, told in ((9, False), (8, True)):
        losses = {"n2n": {**PLAIN["n2n"], "schedule": {"warmup_steps": 8}}}
        Distiller(painn(), gemnet(), losses, steps=steps)
        assert ("the loss never counts in full" in caplog.text) is told


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "no term with a coefficient above 0"),
        ({"n2n": None}, "no term with a coefficient above 0"),
        ({"n2n": {"coefficient": 0}}, "no term with a coefficient above 0"),
        (["n2m"], "losses.n2m has the unknown kind 'n2m'.*did you mean 'n2n'"),
        ({"n2n": {"studnt": "node"}}, "losses.n2n has an unknown key 'studnt'"),
        ({"n2n": {"coefficient": float("nan")}}, "losses.n2n.coefficient"),
        ({"n2n": 3}, "losses.n2n must be a mapping of options"),
        ({"n2n": {"student": "node@9"}}, "losses.n2n.student: PaiNN has no feature 'node@9'"),
        ({"n2n": {"schedule": {"decay": "cosine"}}}, "losses.n2n.schedule needs the number"),
        (3, "losses is a int"),
        (None, "losses is a NoneType"),
    ],
)
def test_wrong_losses_are_refused(losses: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distiller(painn(), gemnet(), losses)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": None}, "The teacher is a NoneType"),
        ({"teacher": "gone.pt"}, "teacher: .*gone.pt does not exist"),
        ({"student": 3}, "The student is a int"),
        ({"student": nn.Linear(2, 2)}, "features of Linear cannot be extracted"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"loss_functions": {"energy": {}}}, "loss_functions is a list of mappings"),
        ({"loss_functions": None}, "loss_functions is a list of mappings"),
        ({"loss_functions": ["mae"]}, r"loss_functions\[0\] is str"),
        ({"loss_functions": [{"energy": {"fn": "mae"}}]}, "needs a function, fn, and a coeff"),
        ({"loss_functions": [{"energy": {"fn": "no", "coefficient": 1}}]}, "has no such loss"),
        (
            {"loss_functions": [{"energy": {"fn": "mae", "coefficient": float("nan")}}]},
            "coefficient is nan",
        ),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    arguments = {"student": painn(), "teacher": gemnet(), **given}
    with pytest.raises(UserError, match=message):
        Distiller(arguments.pop("student"), arguments.pop("teacher"), PLAIN, **arguments)


def test_a_student_does_not_teach_itself() -> None:
    student = painn()
    trained = [p.requires_grad for p in student.parameters()]
    with pytest.raises(UserError, match="share weights"):
        Distiller(student, student, PLAIN)
    assert [p.requires_grad for p in student.parameters()] == trained


def test_steps_in_a_wrong_order_are_refused() -> None:
    student = painn()
    distiller = Distiller(student, gemnet(), ["n2n"])
    batch = models.batch()
    with pytest.raises(UserError, match="ran 0 times"), distiller.watch(batch):
        pass
    twice = [student, student]
    with pytest.raises(UserError, match="ran 2 times"), distiller.watch(batch):
        _ = [model(batch) for model in twice]
    with pytest.raises(UserError, match="nothing to compare"):
        distiller.loss()
    with pytest.raises(UserError, match=r"losses\.n2n compares standardised features"):
        watched(distiller, student)
    with pytest.raises(UserError, match="there is no batch"):
        distiller.fit([])
    for samples in (0, True, 2.5):
        with pytest.raises(UserError, match="samples is"):
            distiller.fit([batch], samples=samples)  # type: ignore[arg-type]
    distiller.fit([models.batch()])
    watched(distiller, student)
    with pytest.raises(UserError, match="nothing to compare"):
        distiller.loss()
    strange = models.batch()
    strange.atomic_numbers[0] = 95
    with pytest.raises(UserError, match="does not know"), distiller.watch(strange):
        student(strange)


def test_a_list_of_teachers_is_their_mean() -> None:
    student, teachers = painn(), [gemnet(), models.small_model("painn", seed=5)]
    loss = watched(Distiller(student, teachers, {"vanilla": {"forces": 0}}), student)
    said = torch.stack([one.eval()(models.batch())["energy"].double() for one in teachers]).mean(0)
    ours = student(models.batch())["energy"].double()
    assert loss.item() == pytest.approx((ours - said).abs().mean().item(), rel=1e-4)
    with pytest.raises(UserError, match="of the type Odd"):
        Distiller(student, [gemnet(), Odd()], {"vanilla": {}})  # type: ignore[list-item]


# -- the trainer, and several processes ------------------------------------------------------------


def test_a_trainer_steps_as_a_loop_of_ones_own(tmp_path: Path, data: Path, teacher: Path) -> None:
    """The same terms of the same projections: the same loss, and one state.

    But for rounding: the trainer's teacher has spoken of these structures in other batches.
    """
    losses = {"n2n": {"coefficient": 3.0}, "v2v": {}, "vanilla": {}}
    arguments = config(tmp_path, data, teacher=teacher, losses=losses)
    with trainer(arguments) as built:
        built.set_up()
        built.step = 1
        built.model.train()
        batch = next(iter(built.train_loader))
        loss = built._compute_loss(built._forward(batch.clone()), batch)
        told = built.distiller.values()
        labels = OCPTrainer._compute_loss(built, OCPTrainer._forward(built, batch), batch)
        own = Distiller(
            built._unwrapped_model,
            teacher,
            losses,
            units=Units(built.normalizers, built.elementrefs),
            loss_functions=arguments["loss_functions"],
        )
        own.distillation.statistics_samples = 8  # as the config has it
        own.load_state_dict(built.own_state())
        with own.watch(batch):
            built._unwrapped_model(batch)
        distilled = own.loss(labels, step=1)
        torch.testing.assert_close(labels + distilled, loss, rtol=1e-6, atol=0)
        assert own.values() == pytest.approx(told, rel=1e-6)
        assert told["label_loss"] == pytest.approx(labels.item())
        assert own.step == 1


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Students in DistributedDataParallel, projections through `average_gradients`."""
    whole = step_of([0, 1, 2, 3])
    start_ranks(step_of_rank, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0]["projections"], ranks[1]["projections"], "projections")
    for key in ("student", "projections"):
        assert ranks[0][key].keys() == whole[key].keys()
        for name, gradient in whole[key].items():
            atol = 1e-5 * gradient.abs().max().item() + 1e-9
            torch.testing.assert_close(ranks[0][key][name], gradient, rtol=1e-4, atol=atol)
        assert any(gradient.abs().max() > 0 for gradient in whole[key].values())
    assert ranks[0]["values"] == pytest.approx(whole["values"], rel=1e-5)


def test_projections_of_a_term_that_does_not_count_stay_with_several_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with one: averaging makes no gradients of zeros, by which AdamW would go on."""
    student = painn()
    ends = {"kind": "n2n", "standardize": False, "schedule": {"stop": 0.25}}
    distiller = Distiller(student, gemnet(), {**PLAIN, "early": ends}, steps=8)
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-2)
    terms = distiller.distillation.terms
    for step in range(1, 5):
        before = {name: term.projection.weight.detach().clone() for name, term in terms.items()}
        with distiller.watch(models.batch()):
            student(models.batch())
        optimizer.zero_grad()
        distiller.loss().backward()
        with monkeypatch.context() as two:  # ranks, of which the other does the same
            two.setattr(ranks, "world_size", lambda: 2)
            two.setattr(ranks, "all_sum", lambda values: values.mul_(2))
            distiller.average_gradients()
        optimizer.step()
        moved = {n: not torch.equal(terms[n].projection.weight, before[n]) for n in terms}
        assert moved == {"n2n": True, "early": step <= 2}


def step_of_rank(rank: int, world: int, root: Path) -> None:
    """Unequal shares of the batch of one process."""
    torch.save(step_of([[0], [1, 2, 3]][rank], ranks=world), root / f"rank{rank}")


def step_of(chosen: list[int], ranks: int = 1) -> dict[str, Any]:
    """Gradients and values of a step with these structures."""
    samples = [models.to_data(atoms) for atoms in models.structures(4, seed=4)]
    student = painn()
    model = student if ranks == 1 else DistributedDataParallel(student, find_unused_parameters=True)
    losses = {"n2n": {"atoms": "free"}, "v2v": {}, "cka": {}, "vanilla": {}}
    distiller = Distiller(model, gemnet(), losses)
    distiller.fit([data_list_collater(samples, otf_graph=True)])
    batch = data_list_collater([samples[i] for i in chosen], otf_graph=True)
    with distiller.watch(batch):
        model(batch)
    distiller.loss().backward()
    distiller.average_gradients()
    return {
        "student": {n: p.grad for n, p in student.named_parameters() if p.grad is not None},
        "projections": {str(i): p.grad for i, p in enumerate(distiller.parameters())},
        "values": distiller.values(),
    }


class Odd:
    """Teaches, but is no model."""

    def teach(self) -> None:
        """Nothing."""
