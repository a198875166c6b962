"""The order of edges that sums share, and inputs that are refused."""

from __future__ import annotations

import pytest
import torch
from edge_sums import DEVICE, Recorder, graph
from edge_sums import way as way

from fairchem_kd.ops import EdgeOrder, edge_order, edge_to_node


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_shared_order_gives_the_same_bits(is_sorted):
    features, vectors, target = graph(120, 9, 5, dtype=torch.float32)
    target = target.sort().values if is_sorted else target
    order = edge_order(target, 9)
    assert (order.perm is None) == (is_sorted and DEVICE == "cpu")
    features.requires_grad_()
    alone = edge_to_node(features, target, 9, edge_vectors=vectors)
    with Recorder() as seen:
        shared = edge_to_node(features, target, 9, edge_vectors=vectors, order=order)
        torch.autograd.grad(sum(x.square().sum() for x in shared), features)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert "edge_sum_nodes" in seen.names
    assert "edge_sum_edges" in seen.names
    assert not {name for name in seen.names if "sort" in name}


@pytest.mark.parametrize("num_nodes", [5, 2**15 + 5])  # with 16 and 32 bit keys
def test_order_is_the_stable_one(num_nodes):
    target = torch.tensor([4, 0, 4, 2, 0, num_nodes - 1, 2])
    order = edge_order(target, num_nodes)
    perm = target.argsort(stable=True)
    assert order.perm.tolist() == perm.tolist()
    counts = torch.bincount(target, minlength=num_nodes)
    assert torch.equal(order.offsets.diff(), counts)
    assert (order.num_edges, order.num_nodes) == (7, num_nodes)
    promised = edge_order(target[perm], num_nodes, is_sorted=True)
    assert promised.perm is None
    assert torch.equal(promised.offsets, order.offsets)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_an_index_that_nobody_looks_for_adds_to_no_atom():
    features, _, target = graph(50, 6, 3)
    wrong = target.clone()
    wrong[[3, 20, 30, 40]] = torch.tensor([-1, 6, 6 + 2**16, -(2**16)])
    features.requires_grad_()
    got = edge_to_node(features, wrong, 6, check=False)
    torch.autograd.grad(got.sum(), features)  # stays within memory
    rest = wrong == target
    assert torch.equal(got, edge_to_node(features[rest], target[rest], 6))
    for check in (True, None):
        with torch.autograd.detect_anomaly(check_nan=False), pytest.raises(ValueError):
            edge_to_node(features, wrong, 6, check=check)


def test_an_order_that_does_not_fit():
    features, _, target = graph(10, 4, 3)
    order = edge_order(target, 4)
    with pytest.raises(ValueError, match="of 10 edges onto 4 atoms, and not of 10 onto 5"):
        edge_to_node(features, target, 5, order=order)
    with pytest.raises(ValueError, match="of 10 edges onto 4 atoms, and not of 9 onto 4"):
        edge_to_node(features[1:], target[1:], 4, order=order)
    with pytest.raises(ValueError, match="of another target_index"):
        edge_to_node(features, target.flip(0), 4, order=order, check=True)
    elsewhere = EdgeOrder(*(x.to("meta") for x in (order.target, order.perm, order.offsets)))
    with pytest.raises(ValueError, match="the order is on meta"):
        edge_to_node(features, target, 4, order=elsewhere)
    with pytest.raises(ValueError, match="does not ascend"):
        edge_order(target, 4, is_sorted=True, check=True)
    with pytest.raises(ValueError, match=r"must be \(E,\)"):
        edge_order(target[:, None], 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edge_features": torch.zeros(4)}, ValueError, r"must be \(E, C\)"),
        ({"edge_features": torch.zeros(4, 2, dtype=torch.long)}, TypeError, "floating point"),
        ({"target_index": torch.zeros(3, dtype=torch.long)}, ValueError, r"must be \(4,\)"),
        ({"target_index": torch.zeros(4, 1, dtype=torch.long)}, ValueError, r"must be \(4,\)"),
        ({"target_index": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
        ({"target_index": torch.tensor([0, 1, 2, 3])}, ValueError, r"has 3, outside \[0, 3\)"),
        ({"target_index": torch.tensor([0, -1, 2, 1])}, ValueError, r"has -1, outside \[0, 3\)"),
        ({"num_nodes": 0}, ValueError, "4 edges cannot end on num_nodes=0"),
        ({"num_nodes": -1}, ValueError, "num_nodes=-1"),
        ({"edge_vectors": torch.zeros(4, 2)}, ValueError, r"edge_vectors must be \(4, 3\)"),
        ({"edge_vectors": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "floating point"),
        ({"edge_vectors": torch.zeros(4, 3, device="meta")}, ValueError, "several devices"),
        ({"reduce": "max"}, ValueError, "'sum' or 'mean', not 'max'"),
    ],
)
def test_wrong_inputs(change, error, message):
    given = {
        "edge_features": torch.zeros(4, 2),
        "target_index": torch.zeros(4, dtype=torch.long),
        "num_nodes": 3,
        "edge_vectors": None,
        "reduce": "sum",
        "check": True,
    } | {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with pytest.raises(error, match=message):
        edge_to_node(given.pop("edge_features"), given.pop("target_index"), **given)
