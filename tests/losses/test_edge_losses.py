"""e2e: edges of two graphs are matched by source, target and cell offset, against loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captures import batch, extract, small
from captures import float64 as float64
from models import model_config, small_model
from terms import WHERE, compare, generator, mean, random, standardised, value

from fairchem_kd.errors import UserError
from fairchem_kd.features import GRAPH, FeatureExtractor, FeatureSpec, Request
from fairchem_kd.losses import LossInputs, loss_class, match_edges
from fairchem_kd.ops import edge_to_node

STUDENT, TEACHER = 5, 7
EDGE = Request("edge", "edge")
ATOMS = 6


def edges(number: int, seed: int) -> torch.Tensor:
    """Edges ``(number, 5)`` of 6 atoms, each once, with offsets of -2 to 2."""
    drawn = generator(seed)
    ends = torch.randint(0, ATOMS, (4 * number, 2), generator=drawn)
    offsets = torch.randint(-2, 3, (4 * number, 3), generator=drawn) * (
        torch.rand(4 * number, 1, generator=drawn) < 0.5
    )
    unique = torch.unique(torch.cat([ends, offsets.long()], 1), dim=0)
    return unique[torch.randperm(len(unique), generator=drawn)[:number]]


def e2e(**options: Any) -> Any:
    term = loss_class("e2e", WHERE).from_options(options, WHERE)
    assert term.student_requests() == term.teacher_requests() == [EDGE, GRAPH]
    graph = FeatureSpec(*GRAPH, 5, "")
    term.build(
        {EDGE: FeatureSpec(*EDGE, STUDENT, ""), GRAPH: graph},
        {EDGE: FeatureSpec(*EDGE, TEACHER, ""), GRAPH: graph},
        generator(),
    )
    return term.double()


def inputs_of(ours: torch.Tensor, theirs: torch.Tensor) -> LossInputs:
    fixed = torch.tensor([0, 1, 0, 0, 1, 0])
    structures = SimpleNamespace(
        natoms=torch.tensor([2, 4]), fixed=fixed, atomic_numbers=torch.ones(ATOMS),
        batch=torch.tensor([0, 0, 1, 1, 1, 1]),
    )  # fmt: skip
    student = {EDGE: random(len(ours), STUDENT), GRAPH: ours}
    teacher = {EDGE: 3 * random(len(theirs), TEACHER, seed=1) + 1, GRAPH: theirs}
    return LossInputs(structures, student, teacher)


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_matched_as_a_dictionary_does(seed: int) -> None:
    ours, theirs = edges(40, seed), edges(60, seed + 10)
    known = {tuple(edge): row for row, edge in enumerate(theirs.tolist())}
    place, matched = match_edges(ours, theirs, ATOMS)
    assert 0 < matched.sum() < len(ours)
    for edge, row, found in zip(ours.tolist(), place.tolist(), matched.tolist(), strict=True):
        assert found == (tuple(edge) in known)
        if found:
            assert row == known[tuple(edge)]


def test_offsets_that_are_absurd_match_nothing() -> None:
    far = torch.tensor([[0, 1, 100, 0, 0], [0, 1, 0, -250, 0], [0, 1, 99, 0, 0]])
    assert match_edges(far, far, 2)[1].tolist() == [False, False, True]


def test_no_edges_match_none() -> None:
    some, none = edges(5, 0), torch.zeros(0, 5, dtype=torch.long)
    assert not match_edges(some, none, ATOMS)[1].any()
    assert match_edges(none, some, ATOMS)[1].shape == (0,)


@pytest.mark.parametrize("fn", ["mse", "mae", "huber"])
@pytest.mark.parametrize("atoms", ["all", "free"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_e2e_equals_loops(fn: str, atoms: str, masked: bool, standardize: bool) -> None:
    term = e2e(fn=fn, atoms=atoms, standardize=standardize, delta=0.7)
    inputs = inputs_of(edges(40, 0), edges(60, 10))
    systems = [True, not masked]
    if masked:
        inputs.systems = torch.tensor(systems)
    ours, theirs = inputs.student[GRAPH].tolist(), inputs.teacher[GRAPH].tolist()
    free = (inputs.batch.fixed == 0).tolist()
    term.update_statistics(inputs.teacher, inputs.batch)
    term.finalize_statistics()
    taught = inputs.teacher[EDGE]
    if standardize:
        seen = [e for e, (_, target, *_) in enumerate(theirs) if free[target] or atoms == "all"]
        taught = standardised(taught, seen)
    with torch.no_grad():
        projected = term.projection(inputs.student[EDGE])
    total, count, matched, counting = 0.0, 0, 0, 0
    for s, edge in enumerate(ours):
        target = edge[1]
        if (atoms == "free" and not free[target]) or not systems[0 if target < 2 else 1]:
            continue
        counting += 1
        for t, other in enumerate(theirs):
            if edge == other:
                matched += 1
                for a, b in zip(projected[s], taught[t], strict=True):
                    total, count = total + compare(fn, a - b, 0.7), count + 1
    loss, share = term(inputs)
    assert int(loss.count) == count > 0
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5 if standardize else 1e-12)
    assert share.weight is None
    assert (int(share.total), int(share.count)) == (matched, counting)


def test_the_order_of_edges_and_atoms_does_not_matter() -> None:
    term = e2e(standardize=False)
    inputs = inputs_of(edges(40, 0), edges(60, 10))
    before = value(term(inputs)[:1])
    atoms = torch.tensor([1, 0, 4, 2, 5, 3])  # within structures
    for side, seed in ((inputs.student, 1), (inputs.teacher, 2)):
        order = torch.randperm(len(side[GRAPH]), generator=generator(seed))
        side[EDGE], graph = side[EDGE][order], side[GRAPH][order].clone()
        graph[:, :2] = atoms[graph[:, :2]]
        side[GRAPH] = graph
    assert value(term(inputs)[:1]) == pytest.approx(before, rel=1e-12)


def test_gradients_reach_matched_edges_alone() -> None:
    term = e2e(standardize=False)
    inputs = inputs_of(edges(40, 0), edges(60, 10))
    student, teacher = inputs.student[EDGE].requires_grad_(), inputs.teacher[EDGE].requires_grad_()
    mean(term(inputs)[:1]).backward()
    _, matched = match_edges(inputs.student[GRAPH], inputs.teacher[GRAPH], ATOMS)
    assert torch.equal(student.grad.abs().sum(1) > 0, matched)
    assert teacher.grad is None


def test_no_common_edges_give_an_empty_sum() -> None:
    for theirs in (torch.zeros(0, 5, dtype=torch.long), torch.tensor([[0, 1, 3, 0, 0]])):
        term = e2e(standardize=False)
        inputs = inputs_of(edges(40, 0), theirs)
        loss, share = term(inputs)
        assert float(loss.total.detach()) == int(loss.count) == int(share.total) == 0
        loss.total.backward()
        assert not term.projection.weight.grad.any()


def test_a_pair_that_shares_few_edges_is_refused() -> None:
    term = e2e(min_matched=0.4)
    term.check_pair({"matched": 0.4})
    with pytest.raises(UserError, match=r"of the student's edges the teacher has 39%.*take e2n"):
        term.check_pair({"matched": 0.39})
    with pytest.raises(UserError, match="has 0%"):
        e2e(min_matched=0).check_pair({"matched": 0.0})


@pytest.mark.parametrize("flavour", ["painn", "gemnet_oc", "schnet"])
def test_the_edges_of_a_model_are_where_its_atoms_are(flavour: str) -> None:
    """The conventions of all architectures: positions and offsets give the unit vectors."""
    data = batch()
    features, _ = extract(small(flavour), data, [GRAPH])
    feature = features[GRAPH]
    graph = feature.values
    assert graph.shape[1] == 5
    assert not graph.is_floating_point()
    source, target = graph[:, 0], graph[:, 1]
    cells = data.cell[data.batch[target]].double()
    moved = data.pos[source] + torch.einsum("ei,eij->ej", graph[:, 2:].double(), cells)
    vectors = data.pos[target] - moved
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit, feature.edge_vectors, rtol=1e-6, atol=1e-6)


def test_models_with_one_cutoff_share_all_their_edges() -> None:
    data = batch()
    graphs = [extract(small(f), data, [GRAPH])[0][GRAPH].values for f in ("painn", "gemnet_oc")]
    assert len(graphs[0]) == len(graphs[1])
    assert match_edges(*graphs, len(data.pos))[1].all()
    shorter = small("schnet", cutoff=3.0)
    few = extract(shorter, data, [GRAPH])[0][GRAPH].values
    assert match_edges(few, graphs[0], len(data.pos))[1].all()
    assert match_edges(graphs[0], few, len(data.pos))[1].float().mean() < 0.6


def test_edges_alone_can_be_asked_for_and_end_a_forward() -> None:
    extractor = FeatureExtractor(small("painn"), [GRAPH])
    data = batch()
    for _ in range(2):
        with extractor.capture(stop=True) as captured:
            extractor._architecture.root(data)
        assert captured[GRAPH].values.shape[1] == 5


def test_a_model_without_edges_is_refused() -> None:
    with pytest.raises(UserError, match="SchNet has no edge features"):
        FeatureExtractor(small_model("schnet"), [EDGE])


@pytest.mark.parametrize("kind", ["rotation", "translation"])
def test_e2e_on_models_is_invariant(kind: str) -> None:
    student, teacher = small("painn"), small("gemnet_oc").eval()
    term = loss_class("e2e", WHERE).from_options({"standardize": False}, WHERE)
    taps = [
        FeatureExtractor(student, term.student_requests()),
        FeatureExtractor(teacher, term.teacher_requests()),
    ]
    term.build(taps[0].specs, taps[1].specs, generator())
    term.double()
    turn, _ = torch.linalg.qr(random(3, 3, seed=9))
    data, values = batch(), []
    moved = data.clone()
    if kind == "rotation":
        moved.pos, moved.cell = data.pos @ turn.T, (data.cell.double() @ turn.T).float()
    else:
        moved.pos = data.pos + torch.tensor([0.3, -1.1, 2.0])
    for graph in (data, moved):
        found = []
        for tap, model in zip(taps, (student, teacher), strict=True):
            with tap.capture() as captured:
                model(graph)
            found.append({request: captured[request].values for request in tap.specs})
        loss, share = term(LossInputs(graph, *found))
        assert int(share.total) == int(share.count) == len(found[0][GRAPH])
        values.append(float((loss.total / loss.count).detach()))
        assert int(loss.count) == int(share.count) * model_config("gemnet_oc")["emb_size_edge"]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_sums_of_matched_edges_are_those_of_e2n() -> None:
    """Where both have the same graph, edges in the teacher's order are what e2n adds up."""
    data = batch()
    found, _ = extract(small("gemnet_oc"), data, [EDGE, GRAPH, ("edge", "node")])
    graph = found[GRAPH].values
    summed = edge_to_node(found[EDGE].values, graph[:, 1].contiguous(), len(data.pos))
    torch.testing.assert_close(summed, found[Request("edge", "node")].values)
