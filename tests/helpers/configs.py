"""The configs of yaml_configs, read as fairchem reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fairchem.core.common.utils import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of a module that imports this runs where the configs' paths start."""
    monkeypatch.chdir(ROOT)


def read(path: str, *, may_override: bool = True) -> dict[str, Any]:
    """The config at ``path`` with what it includes.

    Two of its includes never say different things; its own keys go before theirs where it
    ``may_override`` them.
    """
    config, overridden, conflicts = load_config(path)
    assert not conflicts
    assert may_override or not overridden
    return config
