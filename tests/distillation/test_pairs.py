"""Every teacher with every student and every loss: it trains, or is refused, and rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import config, trainer, write_splits, write_teacher

from fairchem_kd.errors import UserError
from fairchem_kd.losses import known_losses

MODELS = ("gemnet_oc", "painn", "schnet")
VECTORS = {"gemnet_oc", "painn"}
#: The models that a loss can have as student and as teacher; the others have all.
STUDENTS = dict.fromkeys(("v2v", "v2v_geometric", "v2v_by_head", "e2e"), VECTORS)
TEACHERS = {
    "e2n": VECTORS,
    "e2e": VECTORS,
    "v2v": VECTORS,
    "v2v_geometric": VECTORS,
    "v2v_by_head": {"gemnet_oc"},
    "n2n_by_head": {"gemnet_oc"},
}
#: What a refusal says, by the model that lacks something and the kind.
REASONS = {
    ("schnet", "e2e"): "SchNetWrap has no feature 'edge': SchNet has no edge features",
    ("schnet", "e2n"): "SchNetWrap has no feature 'edge': SchNet has no edge features",
    ("schnet", "v2v"): "SchNetWrap has no feature 'vector': SchNet has no vectors",
    ("schnet", "n2n_by_head"): "no linear head of the teacher reads 'node' alone",
    ("painn", "n2n_by_head"): "no linear head of the teacher reads 'node' alone",
    ("painn", "v2v_by_head"): "no linear head of the teacher reads 'vector' alone",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lsp_teacher": {"kind": "lsp", "edges": "teacher"},
    "relational_teacher": {"kind": "relational", "edges": "teacher", "pairs": 20},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_splits(tmp_path_factory.mktemp("pairs"), train=(6, 0), val=(2, 50))
    for model in MODELS:
        write_teacher(root / model, root, model).rename(root / f"{model}.pt")
    return root


def fits(kind: str, student: str, teacher: str) -> bool:
    if kind == "antisymmetric" and student == "schnet":  # its forces are a slope
        return False
    return student in STUDENTS.get(kind, MODELS) and teacher in TEACHERS.get(kind, MODELS)


def arguments(
    root: Path, tmp_path: Path, student: str, teacher: str, losses: dict[str, Any]
) -> dict[str, Any]:
    own = {"checkpoint": str(root / f"{teacher}.pt"), "store": "off"}
    pairs = {"copies": 0.7, "std": 0.02, "antithetic": True, "pool": None}
    rattle = pairs if "jacobian_antithetic" in losses else None
    block = {"teacher": own, "losses": losses, "rattle": rattle}
    return config(tmp_path, root, model=student, distillation=block, max_epochs=1)


@pytest.mark.parametrize("teacher", MODELS)
@pytest.mark.parametrize("student", MODELS)
def test_what_fits_trains(root: Path, tmp_path: Path, student: str, teacher: str) -> None:
    losses = {kind: {} for kind in known_losses() if fits(kind, student, teacher)} | VARIANTS
    with trainer(arguments(root, tmp_path, student, teacher, losses)) as built:
        built.set_up()
        before = [p.detach().clone() for p in built._unwrapped_model.parameters()]
        for step, batch in enumerate(built.train_loader, start=1):
            built.step = step
            built.take_step(batch)
            for name, term in built.distillation.terms.items():
                for parameter, value in term.named_parameters():
                    assert value.grad is not None, f"{name}.{parameter}"
        assert step == 2
        values = built.distillation.values.read()
        after = list(built._unwrapped_model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name in losses:
        found = [v for n, v in values.items() if n.split(".")[0] == name]
        assert found, name
        assert all(abs(value) < 1e6 for value in found), (name, found)  # and no NaN
    assert values.get("e2e.matched", 1.0) == 1.0  # all have the same cutoff
    assert "e2e.matched_weighted" not in values


REFUSED = [
    (student, teacher, kind)
    for student in MODELS
    for teacher in MODELS
    for kind in (*STUDENTS, *TEACHERS)
    if not fits(kind, student, teacher) and (kind in STUDENTS or student == "painn")
]


@pytest.mark.parametrize("case", sorted(set(REFUSED)), ids="-".join)
def test_what_does_not_fit_is_refused(case: tuple[str, str, str], root: Path) -> None:
    """By the pair alone, before any training; the trainer builds terms in the same way."""
    from models import small_model

    from fairchem_kd.distillation.pairing import choose
    from fairchem_kd.models.frozen import Teacher
    from fairchem_kd.models.units import Units

    student, teacher, kind = case
    lacking = student if student not in STUDENTS.get(kind, MODELS) else teacher
    reason = REASONS.get((lacking, kind)) or REASONS[lacking, kind.partition("_")[0]]
    outputs = {"energy": {}, "forces": {}}
    with pytest.raises(UserError) as error:
        choose(kind, small_model(student), Teacher(small_model(teacher), Units({}, {}), outputs))
    assert reason in str(error.value)


def test_a_refusal_names_the_term(root: Path, tmp_path: Path) -> None:
    given = arguments(root, tmp_path, "painn", "schnet", {"mine": {"kind": "e2e"}})
    with trainer(given) as built, pytest.raises(UserError) as error:
        built.set_up()
    assert str(error.value).startswith("task.distillation.losses.mine.teacher: SchNetWrap has no")


def test_graphs_that_share_few_edges_are_refused_before_the_first_step(
    root: Path, tmp_path: Path
) -> None:
    given = arguments(root, tmp_path, "painn", "gemnet_oc", {"e2e": {"min_matched": 0.9}})
    given["model"]["cutoff"] = 8.0
    given["model"]["max_neighbors"] = 200
    with trainer(given) as built:
        with pytest.raises(UserError, match=r"losses\.e2e: of the student's edges the teacher has"):
            built.set_up()
        assert built._unwrapped_model.training
