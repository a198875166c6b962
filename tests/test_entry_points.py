"""Losses and architectures of other packages, by entry points."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrap

from fairchem_kd import entry_points
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.features import architecture, architecture_of
from fairchem_kd.losses import NodeToNode, known_losses, loss_class

LOSSES = """
from fairchem_kd.features import Architecture, register_architecture
from fairchem_kd.losses import NodeToNode
from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrap

class Mine(NodeToNode):
    "Another n2n."

class Dimes(Architecture):
    model_class = DimeNetPlusPlusWrap
    atom_embedding = None
    num_elements = 5

@register_architecture
class Decorated(Dimes):
    "Registered by its import too."
"""

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package `others` with these entry points where Python looks for packages."""
    monkeypatch.setattr("fairchem_kd.losses.base._LOSSES", known_losses())
    registered = architecture._ARCHITECTURES.copy()
    monkeypatch.setattr(architecture, "_ARCHITECTURES", registered)

    def make(points: str) -> None:
        (tmp_path / "others.py").write_text(LOSSES)
        info = tmp_path / "others-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        monkeypatch.syspath_prepend(str(tmp_path))
        entry_points.offered.cache_clear()

    yield make
    sys.modules.pop("others", None)
    entry_points.offered.cache_clear()


def test_a_loss_of_another_package_has_a_name(install: Install) -> None:
    with pytest.raises(UserError, match="unknown kind 'mine'"):
        loss_class("mine", "here")
    install("[fairchem_kd.losses]\nmine = others:Mine\n")
    found = loss_class("mine", "here")
    assert issubclass(found, NodeToNode)
    assert found.kind == "mine"
    assert known_losses()["mine"] is found
    block = {"teacher": {"checkpoint": "t.pt"}, "losses": {"a": {"kind": "mine", "fn": "mae"}}}
    assert isinstance(parse_distillation({"distillation": block}).terms["a"], found)
    with pytest.raises(UserError, match=r"unknown kind 'minne' \(did you mean 'mine'"):
        loss_class("minne", "here")


@pytest.mark.parametrize("name", ["Dimes", "Decorated"])
def test_an_architecture_of_another_package_is_found(install: Install, name: str) -> None:
    model = DimeNetPlusPlusWrap.__new__(DimeNetPlusPlusWrap)
    with pytest.raises(UserError, match="features of DimeNetPlusPlusWrap cannot be extracted"):
        architecture_of(model)
    install(f"[fairchem_kd.architectures]\ndimes = others:{name}\n")
    assert type(architecture_of(model)).__name__ == name


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("broken = nowhere:Loss", r"others offers fairchem_kd.losses 'broken' .* cannot be impor"),
        ("broken = others:Nothing", "cannot be imported"),
        ("broken = others:Dimes", "'broken' of fairchem_kd.losses is no loss"),
        ("n2n = others:Mine", "'n2n' .* has the name of another loss, which stays"),
    ],
)
def test_what_is_no_loss_is_left_out_and_told_of(
    install: Install, point: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = known_losses()
    install(f"[fairchem_kd.losses]\n{point}\n")
    with caplog.at_level(logging.WARNING):
        assert known_losses() == before
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_what_is_no_architecture_is_left_out(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("[fairchem_kd.architectures]\ndimes = others:Mine\n")
    model = DimeNetPlusPlusWrap.__new__(DimeNetPlusPlusWrap)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="cannot be extracted"):
        architecture_of(model)
    assert "is no architecture: left out" in caplog.text
