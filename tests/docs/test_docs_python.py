"""docs/python.md and its notebook, run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from configs import ROOT

DOCS = ROOT / "docs"
pytestmark = [
    # fairchem's PaiNN calls a method that newer torch_geometric calls a no-op
    pytest.mark.filterwarnings("ignore:'PaiNNMessage.jittable' is deprecated"),
]


def page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.S | re.M)


def notebook() -> list[str]:
    cells = json.loads((DOCS / "in_your_own_loop.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not committed"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("blocks", [page, notebook], ids=["page", "notebook"])
def test_the_loop_runs_as_it_stands(
    blocks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks():  # type: ignore[operator]
            exec(compile(block, "docs", "exec"), names)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    start, end = (
        float(re.search(r"'vanilla.forces': ([\d.]+)", line)[1])  # type: ignore[index]
        for line in (first, second)
    )
    assert end < start
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == {
        "student",
        "distiller",
        "optimizer",
    }


def test_page_and_notebook_say_the_same() -> None:
    assert [block for block in page() if block.strip() in {b.strip() for b in notebook()}]
    assert {block.strip() for block in page()[:4]} <= {block.strip() for block in notebook()}
