"""What has to hold of the features of any model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from fairchem_kd.features import Feature, FeatureExtractor, Kind, Request, available_features
from fairchem_kd.random_state import same_draws

#: How a structure can be moved without becoming another one, for most models.
MOVES = ("rotation", "reflection", "translation", "permutation")
#: Of a feature's largest value, in single precision.
TOLERANCE = 1e-4


def check_architecture(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    moves: Iterable[str] = MOVES,
    tolerance: float = TOLERANCE,
) -> None:
    """Check that every feature of a model is what it is called.

    Each fires once and has its promised shape; taps leave the outputs as they are, bit for bit;
    scalars stay the same and vectors turn with the structure; a structure's features do not depend
    on the others in its batch; edges point from their source to their target; and what atoms give
    to the energy adds up to it.

    Args:
        model: of an architecture that is registered.
        samples: two structures or more, as fairchem's data sets give them, periodic or in a large
            cell. Positions in which no two distances are alike are best: where a limit on
            neighbours cuts through equal ones, it depends on the order of the atoms.
        moves: those of `MOVES` under which its features keep.
        tolerance: of a feature's largest value.

    Raises:
        AssertionError: naming the feature.
        RuntimeError: a feature that does not fire once, or has another shape.
    """
    assert len(samples) > 1, "give two structures or more"
    whole, outputs = features_of(model, samples)
    plain = _forward(model, samples)
    for name, value in plain.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, outputs[name]), f"a tap changes the output {name}"
    check_edges(model, samples, tolerance=tolerance)
    for move in moves:
        check_symmetry(model, samples, move, tolerance=tolerance)
    _check_batch(model, samples, whole, tolerance)
    request = Request("atom_energy", "node")
    energy = outputs.get("energy")
    if request in whole and isinstance(energy, Tensor):
        batch = _batch(samples)
        atoms = whole[request].values.squeeze(1)
        total = atoms.new_zeros(len(samples)).index_add(0, batch.batch, atoms)
        _assert_near(total, energy.view(-1).to(total), tolerance, "the sum of atom_energy")


def features_of(
    model: nn.Module, samples: Sequence[Any]
) -> tuple[dict[Request, Feature], Mapping[str, Any]]:
    """Every feature in every form that it can have, detached, and the outputs of the forward."""
    requests = []
    every: tuple[Kind, ...] = ("node", "vector", "edge")
    for address, spec in available_features(model).items():
        forms = every if spec.kind == "edge" else (spec.kind,)
        requests += [Request(address, form) for form in forms]
    with FeatureExtractor(model, requests).capture(detach=True) as captured:
        outputs = _forward(model, samples)
    return {request: captured[request] for request in requests}, outputs


def check_symmetry(
    model: nn.Module, samples: Sequence[Any], move: str, *, tolerance: float = TOLERANCE
) -> None:
    """Check that scalars stay the same and vectors turn when structures are moved.

    Args:
        model, samples, tolerance: as for `check_architecture`.
        move: one of `MOVES`.

    Raises:
        AssertionError: naming the feature.
    """
    others, matrix, order = moved(samples, move)
    before, _ = features_of(model, samples)
    after, _ = features_of(model, others)
    for request, feature in before.items():
        expected, values = feature.values, after[request].values
        if request.form == "vector":
            expected = torch.einsum("xy,nyc->nxc", matrix.to(expected), expected)
        if request.form == "edge":
            expected = expected[_sorted(feature)]
            values = values[_sorted(after[request], order)]
        else:
            expected = expected[order]
        _assert_near(
            values, expected, tolerance, f"{request.address} as {request.form} under {move}"
        )


def check_edges(model: nn.Module, samples: Sequence[Any], *, tolerance: float = TOLERANCE) -> None:
    """Check that edges have the convention of `fairchem_kd.features.Feature`.

    Raises:
        AssertionError: naming the feature.
    """
    features, _ = features_of(model, samples)
    batch = _batch(samples)
    for request, feature in features.items():
        if request.form != "edge":
            continue
        assert feature.edge_index is not None
        assert feature.edge_vectors is not None
        assert feature.cell_offsets is not None
        source, target = feature.edge_index
        pos = batch.pos.detach().double()
        cells = batch.cell.double()[batch.batch[source]]
        shift = torch.einsum("ei,eij->ej", feature.cell_offsets.double(), cells)
        span = pos[target] - (pos[source] + shift)
        unit = span / span.norm(dim=1, keepdim=True)
        words = f"{request.address}: unit vectors from the source to the target"
        _assert_near(feature.edge_vectors.double(), unit, tolerance, words)


def moved(samples: Sequence[Any], move: str, seed: int = 7) -> tuple[list[Any], Tensor, Tensor]:
    """Moved copies of structures.

    Returns:
        The copies; the matrix ``(3, 3)`` that their vectors turn with; and the order ``(N,)``: atom
        i of the copies is atom ``order[i]``.
    """
    assert move in MOVES, f"{move} is none of {', '.join(MOVES)}"
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(3, dtype=torch.float64)
    if move in ("rotation", "reflection"):
        drawn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        matrix, _ = torch.linalg.qr(drawn)
        matrix = matrix * matrix.det() * (1 if move == "rotation" else -1)
    copies, orders, start = [], [], 0
    for number, sample in enumerate(samples):
        atoms = sample.pos.shape[0]
        order = torch.arange(atoms)
        if move == "permutation":
            order = torch.randperm(atoms, generator=generator)
        made = copy.deepcopy(sample)
        for key, value in sample.to_dict().items():
            if isinstance(value, Tensor) and value.dim() and len(value) == atoms:
                made[key] = value[order]
        made.pos = (made.pos.double() @ matrix.T).to(sample.pos)
        if move == "translation":
            made.pos = made.pos + torch.tensor([1.7, -2.3, 3.1 + number]).to(made.pos)
        made.cell = (sample.cell.double() @ matrix.T).to(sample.cell)
        copies.append(made)
        orders.append(order + start)
        start += atoms
    return copies, matrix, torch.cat(orders)


def _check_batch(
    model: nn.Module, samples: Sequence[Any], whole: Mapping[Request, Feature], tolerance: float
) -> None:
    """A structure alone has the features that it has among others."""
    start = 0
    for number, sample in enumerate(samples):
        alone, _ = features_of(model, [sample])
        stop = start + sample.pos.shape[0]
        for request, feature in alone.items():
            among = whole[request]
            values, own = among.values[start:stop], feature.values
            if request.form == "edge":
                assert among.edge_index is not None
                inside = (among.edge_index[1] >= start) & (among.edge_index[1] < stop)
                values = among.values[_sorted(among)][inside[_sorted(among)]]
                own = feature.values[_sorted(feature)]
            words = f"{request.address} as {request.form} of structure {number} among others"
            _assert_near(values, own, tolerance, words)
        start = stop


def _batch(samples: Sequence[Any]) -> Batch:
    """A batch of copies, in their own precision; models make its graph."""
    return Batch.from_data_list(copy.deepcopy(list(samples)))


def _forward(model: nn.Module, samples: Sequence[Any]) -> Mapping[str, Any]:
    batch = _batch(samples)
    device = next(model.parameters()).device
    with same_draws(device):  # one forward has the numbers of another
        out = model(batch.to(device))
    return {
        key: value.detach() if isinstance(value, Tensor) else value for key, value in out.items()
    }


def _sorted(feature: Feature, order: Tensor | None = None) -> Tensor:
    """The order of edges by target, source and cell offset, so that graphs can be compared."""
    assert feature.edge_index is not None
    assert feature.cell_offsets is not None
    ends = feature.edge_index if order is None else order[feature.edge_index]
    keys = torch.stack([ends[1], ends[0], *feature.cell_offsets.round().long().T]).tolist()
    return torch.tensor(
        sorted(range(len(ends[0])), key=lambda e: [row[e] for row in keys]), dtype=torch.long
    )


def _assert_near(values: Tensor, expected: Tensor, tolerance: float, words: str) -> None:
    assert values.shape == expected.shape, f"{words}: {values.shape} is not {expected.shape}"
    if not expected.numel():
        return
    worst = (values - expected).abs().max().item() / max(expected.abs().max().item(), 1e-12)
    assert worst <= tolerance, f"{words} is off by {worst:.2g} of its largest value"
