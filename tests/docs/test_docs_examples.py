"""The examples of docs/extending.md and docs/start.md, run as they stand on the page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fairchem.core.common.registry import registry
from fairchem.core.trainers import OCPTrainer
from models import batch, samples
from trainings import config, trainer, write_lmdb, write_teacher

from fairchem_kd import Teacher, available_features
from fairchem_kd.features import FeatureExtractor, Request, architecture
from fairchem_kd.losses import base
from fairchem_kd.training.records import read_records

DOCS = Path(__file__).resolve().parents[2] / "docs"
DIMENET = {
    "name": "dimenetplusplus",
    "hidden_channels": 16,
    "num_blocks": 2,
    "int_emb_size": 8,
    "basis_emb_size": 4,
    "out_emb_channels": 12,
    "num_spherical": 2,
    "num_radial": 3,
    "cutoff": 3.5,
    "otf_graph": True,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using torch.cross without:UserWarning"),  # DimeNet++'s own
]


def examples() -> dict[str, str]:
    """The blocks of docs/extending.md that begin with the name of a file."""
    page = (DOCS / "extending.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)```", page, re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files in a folder, which is where Python looks for modules; data beside them."""
    folder = tmp_path_factory.mktemp("home")
    for name, text in examples().items():
        (folder / name).write_text(text)
    write_lmdb(folder / "data/train", 6, seed=0)
    write_lmdb(folder / "data/val", 4, seed=50)
    arguments = config(folder, folder / "data")
    arguments["model"] = dict(DIMENET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(base, "_LOSSES", dict(base._LOSSES))
        patch.setattr(architecture, "_ARCHITECTURES", list(architecture._ARCHITECTURES))
        with trainer(arguments, OCPTrainer, identifier="teacher") as built:
            path = built.save(checkpoint_file="teacher.pt", training_state=False)
        Path(path).rename(folder / "my_dimenet.pt")
        yield folder
    for name in ("my_losses", "my_features", "test_mine"):
        sys.modules.pop(name, None)


def train(home: Path, config_file: str, cls: Any, teacher: Path) -> list[dict[str, Any]]:
    """The training steps' metrics of the page's config over a small one."""
    given = yaml.safe_load((home / config_file).read_text())["task"]["distillation"]
    arguments = config(home, home / "data", teacher=teacher, losses=given["losses"], max_epochs=1)
    with trainer(arguments, cls, identifier=Path(config_file).stem) as built:
        built.train(disable_eval_tqdm=True)
        folder = built.config["cmd"]["checkpoint_dir"]
    return [record["metrics"] for record in read_records(folder, "train")]


def test_a_loss_of_ones_own(home: Path) -> None:
    from my_losses import AdsorbateN2N

    cls = registry.get_trainer_class("fairchem_kd.DistillationTrainer")
    teacher = write_teacher(home, home / "data")
    for metrics in train(home, "my_kd.yml", cls, teacher):
        assert metrics["adsorbate_weighted"] == pytest.approx(30 * metrics["adsorbate"], rel=1e-4)
        assert metrics["adsorbate"] > 0

    options = {"adsorbate": 10, "standardize": False, "projection": "identity", "atoms": "free"}
    term = AdsorbateN2N.from_options(options, "losses.adsorbate")
    structures = batch()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, len(structures.pos), 3, generator=generator, dtype=torch.float64)
    specs = {Request("node", "node"): architecture.FeatureSpec("node", "node", 3, "")}
    term.build(specs, specs, generator)
    [part] = term(
        base.LossInputs(
            structures,
            student={Request("node", "node"): values[0]},
            teacher={Request("node", "node"): values[1]},
        )
    )
    total = weight = 0.0
    for atom, (s, t) in enumerate(zip(*values.tolist(), strict=True)):
        if structures.fixed[atom] == 0:
            one = 10.0 if structures.tags[atom] == 2 else 1.0
            total += one * sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
            weight += 3 * one
    assert float(part.total / part.count) == pytest.approx(total / weight, rel=1e-6)


def test_an_architecture_of_ones_own(home: Path) -> None:
    named = yaml.safe_load((home / "my_dimenet.yml").read_text())
    cls = registry.get_trainer_class(named["trainer"])  # which imports the page's module
    for metrics in train(home, "my_dimenet.yml", cls, home / "my_dimenet.pt"):
        assert metrics["e2n"] > 0
        assert metrics["v2v"] > 0

    model = Teacher.from_checkpoint(home / "my_dimenet.pt").model
    assert {"edge", "edge@0", "edge@2", "vector"} <= available_features(model).keys()
    requests = [Request("edge", "edge"), Request("edge@2", "node"), Request("vector", "vector")]
    data = batch()
    with FeatureExtractor(model, requests).capture(detach=True) as captured:
        model(data)
    edge, node, vector = (captured[request] for request in requests)
    source, target = edge.edge_index
    cells = data.cell.view(-1, 3, 3)[data.batch[source]]
    images = data.pos[source] + torch.einsum("ei,eij->ej", edge.cell_offsets.float(), cells)
    away = (data.pos[target] - images).detach()
    unit = away / away.norm(dim=1, keepdim=True)
    torch.testing.assert_close(edge.edge_vectors, unit, atol=1e-5, rtol=0)
    summed = torch.zeros(len(data.pos), 16).index_add(0, target, edge.values)
    torch.testing.assert_close(node.values, summed, atol=1e-5, rtol=1e-5)
    products = edge.values[:, None, :] * unit[:, :, None]
    summed = torch.zeros(len(data.pos), 3, 16).index_add(0, target, products)
    torch.testing.assert_close(vector.values, summed, atol=1e-5, rtol=1e-5)


def test_tests_of_ones_own(home: Path) -> None:
    import test_mine

    test_mine.test_my_loss()
    model = Teacher.from_checkpoint(str(home / "my_dimenet.pt")).model
    test_mine.test_my_features(model, samples(2))


def test_first_steps(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with trainer(config(home, home / "data"), identifier="first") as built:
        built.train(disable_eval_tqdm=True)
        run = built.config["cmd"]["checkpoint_dir"]
    page = (DOCS / "start.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code) == 2
    for block in code:
        exec(block.replace("checkpoints/<timestamp>-first", run), {})
    step, *_ = capsys.readouterr().out.splitlines()
    assert step.startswith("3 "), "evaluated every third step"
    files = re.search(r"\| in `checkpoints/.*?\n\n", page, re.S)
    assert files is not None
    named = set(re.findall(r"^\| `([\w.]+)`", files[0], re.M))
    assert {"best_checkpoint.pt", "checkpoint.pt", "records.jsonl"} <= named
    assert {path.name for path in Path(run).iterdir()} - {"normalizers.pt"} <= named
