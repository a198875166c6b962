"""`fairchem_kd.testing`: it holds of what is ours, and fails of what is wrong."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn

from fairchem_kd.features import architecture, register_architecture
from fairchem_kd.features.painn import PaiNNFeatures
from fairchem_kd.losses import LossInputs, Part, VectorToVector, loss_class, masked_sum
from fairchem_kd.losses.features import NodeToNode
from fairchem_kd.testing import MOVES, check_architecture, check_loss, check_symmetry, moved

OURS = ["n2n", "e2n", "v2v", "vanilla", "per_atom_energy", "gsp", "v2v_geometric", "cka"]


def term(cls: Any, **options: Any) -> Any:
    return cls.from_options(options, "losses.term")


@pytest.mark.parametrize("kind", OURS)
def test_our_losses_are_losses(kind: str) -> None:
    check_loss(term(loss_class(kind, "")), over_batch=kind == "cka")
    if kind in ("n2n", "v2v"):  # v2v looks at components one by one, but with mse
        fn = "huber" if kind == "n2n" else "mse"
        check_loss(term(loss_class(kind, ""), standardize=False, atoms="free", fn=fn))


@pytest.mark.parametrize("flavour", ["painn", "schnet", "gemnet_oc", "esen_hydra"])
def test_our_architectures_are_what_they_say(flavour: str) -> None:
    keep = [m for m in MOVES if m != "reflection"] if flavour in models.SPHERICAL else MOVES
    check_architecture(models.small_model(flavour), models.samples(2), moves=keep, tolerance=2e-3)


def test_moves() -> None:
    samples = models.samples(2)
    for move in MOVES:
        copies, matrix, order = moved(samples, move)
        pos = torch.cat([s.pos for s in samples]).double()[order] @ matrix.T
        shift = torch.cat([s.pos for s in copies]).double() - pos
        assert (shift.abs().max() > 1) == (move == "translation")
        assert torch.linalg.det(matrix).item() == pytest.approx(
            -1 if move == "reflection" else 1, rel=1e-9
        )
    with pytest.raises(AssertionError, match="is none of rotation"):
        moved(samples, "shear")


class MeanOfRank(NodeToNode):
    """A mean in place of a sum: other ranks weigh other numbers of atoms."""

    def forward(self, inputs: LossInputs) -> list[Part]:
        values = self.compared(inputs)
        total, count = masked_sum(values, self.rows(inputs))
        return [Part("", 1.0, total / count, None)]


class Trusting(NodeToNode):
    def forward(self, inputs: LossInputs) -> list[Part]:
        total, count = masked_sum(self.compared(inputs), None)
        return [Part("", 1.0, total, count)]


class FirstAtom(NodeToNode):
    def forward(self, inputs: LossInputs) -> list[Part]:
        values = self.compared(inputs)
        total, count = masked_sum(values * torch.arange(len(values))[:, None], self.rows(inputs))
        return [Part("", 1.0, total, count)]


class Cut(NodeToNode):
    def forward(self, inputs: LossInputs) -> list[Part]:
        values = self.compared(inputs)
        total, count = masked_sum(values + 2 * values.detach(), self.rows(inputs))
        return [Part("", 1.0, total, count)]


class AlongX(VectorToVector):
    def forward(self, inputs: LossInputs) -> list[Part]:
        values = self.compared(inputs)[:, 0]
        total, count = masked_sum(values, self.rows(inputs))
        return [Part("", 1.0, total, count)]


class Handed(VectorToVector):
    """Of the volume that three vectors span, which only a mirror turns round."""

    def forward(self, inputs: LossInputs) -> list[Part]:
        vectors = self.projected(inputs)[:, :, :3]
        total, count = masked_sum(torch.linalg.det(vectors), self.rows(inputs))
        return [Part("", 1.0, total, count)]


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Handed, "mirror images"),
        (MeanOfRank, "dealt out to ranks"),
        (Trusting, "not trusted on"),
        (FirstAtom, "the order of atoms"),
        (Cut, "the gradient gives a slope"),
        (AlongX, "how structures lie in space"),
    ],
)
def test_a_wrong_loss_is_found(cls: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_loss(term(cls))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Architectures of a test alone."""
    mine: list[Any] = []
    monkeypatch.setattr(architecture, "_ARCHITECTURES", mine)
    return mine


def test_wrong_features_are_found(registered: list[Any]) -> None:
    @register_architecture
    class Wrong(PaiNNFeatures):
        def __init__(self, root: nn.Module) -> None:
            super().__init__(root)
            first = architecture.on_input(self.backbone.update_layers[0], 1)
            del self.taps["vector"], self.taps["edge"]
            read = lambda vec: vec[:, 0]  # noqa: E731  (x of a vector is no scalar)
            attach = architecture.on_input(self.backbone.update_layers[0], lambda a: read(a[1]))
            self.add("node", "node", 16, "x of the vectors", attach)
            self.add("vector", "vector", 16, "vec", first)

    samples = models.samples(2)
    assert len(registered) == 1
    with pytest.raises(AssertionError, match="node as node under rotation"):
        check_symmetry(models.small_model("painn"), samples, "rotation", tolerance=1e-3)
    with pytest.raises(AssertionError, match="two structures"):
        check_architecture(models.small_model("painn"), samples[:1])
