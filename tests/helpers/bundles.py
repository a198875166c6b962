"""What holds of modules that are written out as one file."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

from configs import ROOT

from fairchem_kd.calculators.bundle import names_at_the_top


def assert_one_file(modules: Sequence[str]) -> None:
    """No name stands at the top of two of them, and each comes after those that it imports."""
    texts = [(ROOT / f"fairchem_kd/{m.replace('.', '/')}.py").read_text() for m in modules]
    twice = [name for name, times in Counter(names_at_the_top(texts)).items() if times > 1]
    assert not twice
    known: set[str] = set()
    for module, text in zip(modules, texts, strict=True):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairchem_kd"):
                assert node.module in known, f"{module} imports {node.module}"
                assert all(alias.asname is None for alias in node.names), module
        known.add(f"fairchem_kd.{module}")
