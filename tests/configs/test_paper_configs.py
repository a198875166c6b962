"""The paper's settings: every config is read, its models are built, its losses fit the pair."""

from __future__ import annotations

import functools
from bisect import bisect
from pathlib import Path

import pytest
import torch
import yaml
from configs import ROOT, read
from configs import in_root as in_root
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports
from models import batch, fit_scales, structures

from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.features import FeatureExtractor

PAPER = ROOT / "yaml_configs" / "paper"
RUNS = sorted(
    str(path.relative_to(ROOT))
    for path in PAPER.rglob("*.yml")
    if path.parent.name not in ("base", "models", "optim") and path.name != "data.yml"
)
MODELS = sorted(str(path.relative_to(PAPER)) for path in PAPER.glob("*/models/*.yml"))

#: Million parameters as published for OC20's baselines.
PARAMETERS = {"gemnet_oc": 38.9, "painn": 20.1, "schnet": 9.1}

#: The published coefficients, by data set, pair and term.
COEFFICIENTS = {
    "oc20/gemnet_oc_to_painn": {"n2n": 10000, "e2n": 10, "v2v": 1, "vanilla": 1},
    "oc20/painn_to_painn_small": {"n2n": 10000},
    "oc20/gemnet_oc_to_schnet": {"n2n": 100},
    "oc20/painn_to_schnet": {"n2n": 100},
    "oc20/gemnet_oc_to_gemnet_oc_small": {
        "n2n": 10,
        "vanilla": 0.7,
        "e2e": 10000,
        "per_atom_energy": 1,
    },
    "coll/gemnet_oc_to_painn": {"n2n": 100},
    "coll/painn_to_painn_small": {"vanilla": 1, "per_atom_energy": 200, "n2n": 10000, "v2v": 1},
    "coll/painn_to_schnet": {"vanilla": 1, "n2n": 100},
}
#: Files about the structures that are taught, where the loss is on outputs.
MIXED = ("rattled", "adversarial", "synthetic")


@functools.cache
def built(path: str) -> torch.nn.Module:
    """The full-size model of a file in ``paper/*/models``."""
    setup_imports()
    settings = yaml.safe_load((PAPER / path).read_text())["model"]
    torch.manual_seed(0)
    return fit_scales(registry.get_model_class(settings.pop("name"))(**settings))


@pytest.mark.parametrize("path", RUNS)
def test_a_run_is_complete(path: str) -> None:
    config = read(path, may_override=False)
    assert config["trainer"] == "fairchem_kd.DistillationTrainer"
    assert config["dataset"].keys() >= {"train", "val"}
    assert config["outputs"].keys() == {"energy", "forces"}
    parse_distillation(config["task"])
    losses = config["loss_functions"]
    assert losses[0]["energy"] == {"fn": "mae", "coefficient": 1}
    of_components = "/oc20/" in path and config["model"]["name"] == "schnet"
    fn = "mae" if of_components else "l2mae"
    assert losses[1]["forces"] == {"fn": fn, "coefficient": 100}
    optim = config["optim"]
    if "scheduler" not in optim:
        assert optim["lr_milestones"] == sorted(optim["lr_milestones"])
        assert {"lr_gamma", "warmup_steps", "warmup_factor"} <= optim.keys()
    if "/oc20/" in path:
        assert config["dataset"]["train"]["transforms"]["normalizer"] == {
            "energy": {"mean": -0.7554450631141663, "rmsd": 2.887317180633545},
            "forces": {"mean": 0.0, "rmsd": 2.887317180633545},
        }


def test_coefficients_are_the_published_ones() -> None:
    found: dict[str, dict[str, float]] = {}
    for run in RUNS:
        terms = parse_distillation(read(run)["task"]).terms
        pair = str(Path(run).parent.relative_to("yaml_configs/paper"))
        for name, term in terms.items():
            assert Path(run).stem == name or (Path(run).stem in MIXED and name == "vanilla")
            found.setdefault(pair, {})[name] = term.coefficient
            if name in ("n2n", "e2n", "v2v", "e2e"):
                assert term.options.standardize is False
                assert term.options.fn == "mse"
                assert term.options.projection == "linear"
    assert found == COEFFICIENTS


def test_structures_are_made_as_published() -> None:
    """A fixed length of 0.1 Å; one step of the sphere by 0.1 Å; half of a step synthetic."""
    pair = "yaml_configs/paper/oc20/gemnet_oc_to_painn"
    rattled, adversarial, synthetic = (
        parse_distillation(read(f"{pair}/{name}.yml")["task"]) for name in MIXED
    )
    assert rattled.rattle is not None
    assert rattled.rattle.mode == "fixed_length"
    assert rattled.rattle.scales[0] * 3**0.5 == pytest.approx(0.1, rel=1e-4)
    assert adversarial.rattle is not None
    options = adversarial.rattle.adversarial
    assert options is not None
    assert (options.steps, options.bound, options.rate) == (1, "sphere", 0.1)
    assert synthetic.unlabelled is not None
    assert synthetic.unlabelled.share == 0.5
    assert synthetic.unlabelled.mixing(16) == pytest.approx((0.5, 1.0))


def test_optimisers_are_the_published_ones() -> None:
    """Batch, first rate, epochs, average and clipping, by data set and student."""
    published = {
        "oc20/gemnet_oc": (16, 5e-4, 80, 0.999, 10),
        "oc20/gemnet_oc_small": (32, 5e-4, 80, 0.999, 10),
        "oc20/painn": (32, 1e-4, 80, 0.999, 10),
        "oc20/painn_small": (32, 1e-4, 80, 0.999, 10),
        "oc20/schnet": (64, 1e-4, 30, None, None),
        **{f"coll/{name}": (32, 1e-3, 500, 0.999, 10)
           for name in ("gemnet_oc", "painn", "painn_small", "schnet")},
    }  # fmt: skip
    keys = ("batch_size", "lr_initial", "max_epochs", "ema_decay", "clip_grad_norm")
    for run in RUNS:
        data, *pair, name = Path(run).relative_to("yaml_configs/paper").with_suffix("").parts
        student = pair[0].split("_to_")[1] if pair else name
        optim = read(run)["optim"]
        assert tuple(optim.get(key) for key in keys) == published[f"{data}/{student}"], run


def test_the_rate_of_coll_is_followed() -> None:
    """Against the formula, over the whole of a training."""
    optim = yaml.safe_load((PAPER / "coll/optim/all.yml").read_text())["optim"]
    assert 120_000 / optim["batch_size"] == optim["warmup_steps"] == 3750
    for step in range(1000, 1_875_000, 997):
        if step <= optim["warmup_steps"]:
            rate = step / optim["warmup_steps"]
        else:
            rate = optim["lr_gamma"] ** bisect(optim["lr_milestones"], step)
        expected = min((step + 1) / 3750, 1) * 0.01 ** (step / 4e6)
        assert rate == pytest.approx(expected, rel=0.03), step


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS)
def test_a_full_size_model_takes_a_step(path: str) -> None:
    """Forward and backward on one small structure; 39 million parameters take about 1 GB."""
    model = built(path).train()
    name = Path(path).stem
    if path.startswith("oc20") and name in PARAMETERS:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(PARAMETERS[name], rel=0.05)
    out = model(batch(structures(1)))
    (out["energy"].abs().mean() + 100 * out["forces"].norm(dim=1).mean()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained)
    assert sum(p.grad is not None for p in trained) > 0.9 * len(trained)
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("path", [run for run in RUNS if "_to_" in run])
def test_losses_fit_the_pair(path: str) -> None:
    pair, data = Path(path).parent.name, Path(path).parts[2]
    teacher, student = (built(f"{data}/models/{name}.yml") for name in pair.split("_to_"))
    for term in parse_distillation(read(path)["task"]).active_terms.values():
        ours = FeatureExtractor(student, term.student_requests())
        theirs = FeatureExtractor(teacher, term.teacher_requests())
        term.build(ours.specs, theirs.specs, torch.Generator())
