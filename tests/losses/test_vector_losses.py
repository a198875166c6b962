"""v2v_geometric, and features by what a linear head makes of them, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from captures import batch, extract, small
from captures import float64 as float64
from pairs import ATOMS, SYSTEMS, compared, counting, fitted, pair_inputs, pair_loss
from terms import mean, random, standardised, value

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.losses import LossInputs

MASK = [True, False, True]
READOUT = torch.linspace(-1.0, 2.0, 7)


def norm(v: Any) -> float:
    return math.sqrt(sum(x * x for x in v))


@pytest.mark.parametrize(("atoms", "mask"), [("all", None), ("free", None), ("all", MASK)])
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("standardize", [True, False])
def test_v2v_geometric_equals_loops(
    atoms: str, mask: list[bool] | None, angle: float, standardize: bool
) -> None:
    term = pair_loss("v2v_geometric", atoms=atoms, angle=angle, standardize=standardize)
    inputs = pair_inputs(term, mask=mask)
    fitted(term, inputs)
    student, teacher = compared(term, inputs)
    counts = counting(atoms, mask)
    means = []
    for system in range(3):
        rows = [i for i in range(ATOMS) if SYSTEMS[i] == system and counts[i]]
        of_atoms = []
        for i in rows:
            of_channels = []
            for c in range(7):
                s, t = ([rows3[i][k][c] for k in range(3)] for rows3 in (student, teacher))
                cosine = sum(a * b for a, b in zip(s, t, strict=True)) / (norm(s) * norm(t))
                of_channels.append((1 - angle) * abs(norm(s) - norm(t)) + angle * (1 - cosine))
            of_atoms.append(sum(of_channels) / 7)
        if of_atoms:
            means.append(sum(of_atoms) / len(of_atoms))
    (part,) = term(inputs)
    assert int(part.count) == len(means) > 0
    assert value([part]) == pytest.approx(sum(means) / len(means), rel=1e-8)


@pytest.mark.parametrize("kind", ["v2v_geometric", "v2v_by_head"])
@pytest.mark.parametrize("reflect", [False, True])
def test_vectors_may_be_turned(kind: str, reflect: bool) -> None:
    term = pair_loss(kind, readout=READOUT)
    inputs = pair_inputs(term)
    fitted(term, inputs)
    turn, _ = torch.linalg.qr(random(3, 3, seed=9))
    if (torch.linalg.det(turn) < 0) != reflect:
        turn = -turn
    turned = LossInputs(
        inputs.batch,
        {r: torch.einsum("ij,njc->nic", turn, v) for r, v in inputs.student.items()},
        {r: torch.einsum("ij,njc->nic", turn, v) for r, v in inputs.teacher.items()},
    )
    assert value(term(turned)) == pytest.approx(value(term(inputs)), rel=1e-10)
    again = pair_loss(kind, readout=READOUT)
    fitted(again, turned)
    torch.testing.assert_close(again.standardizer.scale, term.standardizer.scale)


def test_vectors_of_no_length_have_finite_gradients() -> None:
    term = pair_loss("v2v_geometric", standardize=False)
    inputs = pair_inputs(term)
    student = torch.zeros(ATOMS, 3, 5).double().requires_grad_()
    inputs.student[term.student_request] = student
    inputs.teacher[term.teacher_request][0] = 0
    mean(term(inputs)).backward()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in term.parameters())


@pytest.mark.parametrize("kind", ["n2n_by_head", "v2v_by_head"])
@pytest.mark.parametrize(("atoms", "mask"), [("all", None), ("free", MASK)])
@pytest.mark.parametrize("standardize", [True, False])
def test_by_head_equals_loops(
    kind: str, atoms: str, mask: list[bool] | None, standardize: bool
) -> None:
    term = pair_loss(kind, readout=READOUT, atoms=atoms, standardize=standardize, epsilon=0.3)
    inputs = pair_inputs(term, mask=mask)
    fitted(term, inputs)
    raw = inputs.teacher[term.teacher_request]
    free = [i for i, counts in enumerate(counting(atoms, None)) if counts]
    scale, spread = torch.ones(7).double(), 1.0
    teacher, w = raw, READOUT.double()
    if standardize:
        teacher = standardised(raw, free)
        # what standardising divided by, from any two values of a channel
        scale = (raw[0] - raw[1]) / (teacher[0] - teacher[1])
        scale = scale[0] if raw.dim() == 3 else scale
        seen = [float(x) for i in free for x in (raw[i] @ w).reshape(-1)]
        middle = 0.0 if raw.dim() == 3 else sum(seen) / len(seen)
        spread = math.sqrt(sum((x - middle) ** 2 for x in seen) / len(seen))
    with torch.no_grad():
        difference = term.projection(inputs.student[term.student_request]) - teacher
    head, rest, numbers = 0.0, 0.0, [0, 0]
    for i, counts in enumerate(counting(atoms, mask)):
        if not counts:
            continue
        for d in difference[i].view(-1, 7):
            head += (sum(float(w[c] * scale[c] * d[c]) for c in range(7)) / spread) ** 2
            rest += sum(float(x) ** 2 for x in d)
            numbers = [numbers[0] + 1, numbers[1] + 7]
    first, second = term(inputs)
    assert (first.name, first.weight, second.name, second.weight) == ("", 1.0, "rest", 0.3)
    assert [int(first.count), int(second.count)] == numbers
    assert value([first]) == pytest.approx(head / numbers[0], rel=1e-5)
    assert value([second]) == pytest.approx(0.3 * rest / numbers[1], rel=1e-5)


@pytest.mark.parametrize("flavour", ["gemnet_oc", "gemnet_oc_hydra"])
def test_the_head_makes_the_outputs_of_the_features(flavour: str) -> None:
    """``w . x_E`` are the energies of atoms and ``w . v`` the forces."""
    model = small(flavour)
    requests = [("node", "node"), ("vector", "vector"), ("edge", "vector"), ("atom_energy", "node")]
    features, outputs = extract(model, batch(), requests)
    node, vector, same, energy = (features[Request(*request)] for request in requests)
    shares = node.values.double() @ node.spec.readout.double()
    torch.testing.assert_close(shares, energy.values[:, 0].double(), rtol=1e-5, atol=1e-6)
    forces = outputs["forces"]
    forces = forces["forces"] if isinstance(forces, dict) else forces
    made = vector.values.double() @ vector.spec.readout.double()
    torch.testing.assert_close(made, forces.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same.spec.readout, vector.spec.readout)


@pytest.mark.parametrize(
    ("flavour", "overrides", "request_"),
    [
        ("gemnet_oc", {}, ("edge", "node")),
        ("gemnet_oc", {}, ("node@1", "node")),
        ("gemnet_oc", {}, ("vector@1", "vector")),
        ("gemnet_oc", {"forces_coupled": True}, ("vector", "vector")),
        ("painn", {}, ("node", "node")),
        ("painn", {}, ("vector", "vector")),
        ("schnet", {}, ("node", "node")),
    ],
)
def test_features_that_no_linear_head_reads(
    flavour: str, overrides: dict[str, Any], request_: tuple[str, Any]
) -> None:
    extractor = FeatureExtractor(small(flavour, **overrides), [Request(*request_)])
    assert extractor.specs[Request(*request_)].readout is None


def test_a_teacher_without_a_linear_head_is_refused() -> None:
    for kind, short in (("n2n_by_head", "n2n"), ("v2v_by_head", "v2v")):
        with pytest.raises(UserError, match=rf"no linear head .* take {short}\."):
            pair_loss(kind)


def test_the_heads_weights_are_the_teachers_and_not_saved() -> None:
    term = pair_loss("n2n_by_head", readout=READOUT)
    assert "readout" not in term.state_dict()
    assert not term.readout.requires_grad
