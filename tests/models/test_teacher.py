"""The frozen teacher: what stock fairchem predicts from the same file, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.common import distutils
from fairchem.core.common.relaxation.ase_utils import OCPCalculator
from fairchem.core.trainers import OCPTrainer
from models import batch, fit_scales, structures
from torch import nn
from trainings import config, trainer, write_lmdb

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, Request
from fairchem_kd.models.build import build_model, model_config
from fairchem_kd.models.elements import as_atomic_numbers
from fairchem_kd.models.file import read_checkpoint, write_checkpoint
from fairchem_kd.models.frozen import Teacher

# fairchem's loaders ask for pinned memory, with a GPU or without
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

ELEMENTS = ["H", "O", "Cu", "Pt"]
REFERENCES = torch.linspace(-1.0, 1.0, 119)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_lmdb(root / "train", 6, seed=0)
    write_lmdb(root / "val", 4, seed=9)
    return root


def _checkpoint(root: Path, data: Path, model: str, *, elementrefs: bool = True) -> Path:
    """What a stock trainer writes for a small model with unequal normalisers and references."""
    arguments = config(root, data, model=model)
    transforms = arguments["dataset"]["train"]["transforms"]
    transforms["normalizer"] = {
        "energy": {"mean": 8.0, "rmsd": 3.0},
        "forces": {"mean": 0.0, "rmsd": 2.0},
    }
    if elementrefs:
        (root / "refs").mkdir(exist_ok=True)
        np.savez(root / "refs" / "refs.npz", element_references=REFERENCES.numpy())
        transforms["element_references"] = {"energy": {"file": str(root / "refs" / "refs.npz")}}
    if model.endswith("_energy"):
        del arguments["outputs"]["forces"]
        arguments["loss_functions"] = arguments["loss_functions"][:1]
        arguments["evaluation_metrics"] = {
            "metrics": {"energy": ["mae"]},
            "primary_metric": "energy_mae",
        }
    with trainer(arguments, OCPTrainer, identifier=model) as built:
        fit_scales(built.model)
        return Path(built.save(checkpoint_file="teacher.pt", training_state=False))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("gemnet"), data, "gemnet_oc")


def _predictions(path: Path) -> list[tuple[float, np.ndarray]]:
    """Energies (eV) and forces (eV/Å) of `structures()` by stock fairchem's own calculator."""
    contents = torch.load(path, weights_only=False)
    logging.disable(logging.INFO)
    try:
        calculator = OCPCalculator(checkpoint_path=path, cpu=True, seed=0)
    finally:
        logging.disable(logging.NOTSET)
    assert contents["config"]["outputs"].keys() == calculator.config["outputs"].keys()
    results = []
    for atoms in structures():
        atoms.calc = calculator
        energy = atoms.get_potential_energy()
        forces = (
            calculator.results["forces"] if "forces" in calculator.results else np.zeros((0, 3))
        )
        results.append((energy, forces))
    return results


@pytest.mark.parametrize(
    "model",
    ["gemnet_oc", "gemnet_oc_gradient", "painn", "painn_gradient", "schnet", "painn_energy"],
)
def test_outputs_are_those_of_the_stock_calculator(tmp_path: Path, data: Path, model: str) -> None:
    path = _checkpoint(tmp_path, data, model)
    teacher = Teacher.from_checkpoint(path, elements=ELEMENTS)
    structs = batch()
    physical = teacher.denormalized(teacher.forward(structs), structs)
    expected = _predictions(path)
    energies = torch.tensor([energy for energy, _ in expected])
    torch.testing.assert_close(physical["energy"], energies, rtol=1e-5, atol=1e-5)
    if model == "painn_energy":
        assert physical.keys() == {"energy"}
    else:
        forces = torch.cat([torch.as_tensor(forces) for _, forces in expected])
        assert forces.abs().max() > 1e-3
        # single systems there, one batch here: sums in another order
        torch.testing.assert_close(physical["forces"], forces, rtol=1e-4, atol=1e-4)
    assert all(not value.requires_grad for value in physical.values())


def test_energies_by_hand(checkpoint: Path) -> None:
    """Normaliser first, then one reference per atom."""
    teacher = Teacher.from_checkpoint(checkpoint, elements=ELEMENTS)
    structs = batch()
    output = teacher.forward(structs)
    physical = teacher.denormalized(output, structs)
    start = 0
    for system, count in enumerate(structs.natoms.tolist()):
        numbers = structs.atomic_numbers[start : start + count].long()
        expected = output.raw["energy"][system, 0].double() * 3.0 + 8.0
        expected += REFERENCES[numbers].double().sum()
        torch.testing.assert_close(
            physical["energy"][system].double(), expected, rtol=1e-6, atol=1e-5
        )
        start += count
    torch.testing.assert_close(physical["forces"], 2.0 * output.raw["forces"])


def test_per_atom_energies_sum_to_the_energy(checkpoint: Path) -> None:
    teacher = Teacher.from_checkpoint(checkpoint, elements=ELEMENTS)
    request = Request("atom_energy", "node")
    structs = batch()
    output = teacher.forward(structs, FeatureExtractor(teacher.model, [request]))
    assert output.features is not None
    atoms = teacher.units.physical_atom_energies(output.features[request].values, structs)
    sums = torch.zeros(structs.natoms.numel()).index_add(0, structs.batch, atoms[:, 0])
    torch.testing.assert_close(sums, teacher.denormalized(output, structs)["energy"])


@pytest.mark.parametrize("model", ["gemnet_oc", "gemnet_oc_gradient", "painn_gradient", "schnet"])
def test_features_are_detached_and_outputs_the_same(tmp_path: Path, data: Path, model: str) -> None:
    teacher = Teacher.from_checkpoint(_checkpoint(tmp_path, data, model), elements=ELEMENTS)
    request = Request("node", "node")
    structs = batch()
    plain = teacher.forward(structs)
    tapped = teacher.forward(structs, FeatureExtractor(teacher.model, [request]))
    assert plain.features is None
    assert tapped.features is not None
    values = tapped.features[request].values
    assert values.shape[0] == structs.pos.shape[0]
    assert not values.requires_grad
    for name, value in plain.raw.items():
        torch.testing.assert_close(tapped.raw[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model", ["gemnet_oc", "gemnet_oc_gradient", "painn", "schnet"])
def test_the_batch_is_left_as_it_was(tmp_path: Path, data: Path, model: str) -> None:
    teacher = Teacher.from_checkpoint(_checkpoint(tmp_path, data, model), elements=ELEMENTS)
    structs = batch()
    structs.pbc = torch.ones(3, dtype=torch.bool)
    before = {key: copy.deepcopy(structs[key]) for key in structs.keys()}  # noqa: SIM118
    teacher.forward(structs)
    assert set(structs.keys()) == set(before)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(structs[key], value), key
            assert structs[key].shape == value.shape, key
    assert not structs.pos.requires_grad


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one, so that stock wraps its model as the `fairchem` command does."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    assert distutils.initialized()
    yield
    torch.distributed.destroy_process_group()


def test_ema_weights_and_ddp_prefixes_are_understood(
    tmp_path: Path, data: Path, one_rank: None
) -> None:
    """After training, checkpoint.pt and best_checkpoint.pt of one step give the same teacher."""
    arguments = config(tmp_path, data, model="painn", eval_every=4, max_epochs=2)
    with trainer(arguments, OCPTrainer) as built:
        fit_scales(built.model)
        built.ema = None
        built.load_extras()
        built.train(disable_eval_tqdm=True)
        built.save(checkpoint_file="best.pt", training_state=False)
        last = Path(built.save(checkpoint_file="last.pt"))
    contents = read_checkpoint(last)
    assert next(iter(contents["state_dict"])).startswith("module.")
    best = Teacher.from_checkpoint(last.with_name("best.pt"), elements=ELEMENTS)
    averaged = Teacher.from_checkpoint(last, elements=ELEMENTS)
    contents["ema"] = None
    raw = Teacher.from_checkpoint(
        write_checkpoint(contents, tmp_path / "raw.pt"), elements=ELEMENTS
    )
    differ = False
    for (name, ours), theirs, unaveraged in zip(
        averaged.model.named_parameters(),
        best.model.parameters(),
        raw.model.parameters(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), name
        differ |= not torch.equal(ours, unaveraged)
    assert differ


def test_a_wrapper_is_built_as_its_stock_model(tmp_path: Path, checkpoint: Path) -> None:
    contents = read_checkpoint(checkpoint)
    contents["config"]["model"] |= {"name": "gemnet_oc_kd", "features": ["node"]}
    path = write_checkpoint(contents, tmp_path / "wrapper.pt")
    teacher = Teacher.from_checkpoint(path, elements=ELEMENTS)
    assert type(teacher.model).__name__ == "GemNetOC"


def test_a_scale_file_of_another_machine_is_not_needed(tmp_path: Path, checkpoint: Path) -> None:
    contents = read_checkpoint(checkpoint)
    contents["config"]["model"]["scale_file"] = "/nowhere/scales.json"
    Teacher.from_checkpoint(write_checkpoint(contents, tmp_path / "t.pt"), elements=ELEMENTS)


def test_a_separate_scale_dict_is_loaded(tmp_path: Path, checkpoint: Path) -> None:
    contents = read_checkpoint(checkpoint)
    scales = {
        name.removesuffix(".scale_factor"): float(value)
        for name, value in contents["state_dict"].items()
        if name.endswith(".scale_factor")
    }
    assert scales
    for name in scales:
        del contents["state_dict"][f"{name}.scale_factor"]
    contents["scale_dict"] = scales
    path = write_checkpoint(contents, tmp_path / "t.pt")
    teacher = Teacher.from_checkpoint(path, elements=ELEMENTS)
    expected = Teacher.from_checkpoint(checkpoint, elements=ELEMENTS)
    structs = batch()
    assert torch.equal(
        teacher.forward(structs).raw["energy"], expected.forward(structs).raw["energy"]
    )


def test_the_teacher_is_frozen_and_no_module(checkpoint: Path) -> None:
    teacher = Teacher.from_checkpoint(checkpoint, elements=ELEMENTS)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

    assert not Holder().state_dict()
    Holder().train()
    assert not teacher.model.training
    teacher.model.train()
    teacher.forward(batch())
    assert not teacher.model.training


def test_building_a_teacher_draws_no_random_numbers(checkpoint: Path) -> None:
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    Teacher.from_checkpoint(checkpoint, elements=ELEMENTS)
    assert draw() == expected


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gemnet_oc", "painn"])
def test_unfitted_scale_factors_are_refused(tmp_path: Path, data: Path, model: str) -> None:
    contents = read_checkpoint(_checkpoint(tmp_path, data, model))
    names = [name for name in contents["state_dict"] if name.endswith(".scale_factor")]
    contents["state_dict"][names[-1]].zero_()
    path = write_checkpoint(contents, tmp_path / "t.pt")
    with pytest.raises(UserError, match=r"checkpoint: .*unfitted scale factors.*fit-scales"):
        Teacher.from_checkpoint(path, elements=ELEMENTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_diverged_is_refused(tmp_path: Path, checkpoint: Path, value: float) -> None:
    contents = read_checkpoint(checkpoint)
    model = build_model(contents, "t.pt")
    name = next(name for name, weight in model.named_parameters() if weight.dim() == 2)
    for key, weight in contents["state_dict"].items():
        if key.endswith(name):
            weight[-1, -1] = value
    contents["ema"] = None
    path = write_checkpoint(contents, tmp_path / "t.pt")
    with pytest.raises(UserError, match=r"t\.pt are not finite .*lr_initial"):
        Teacher.from_checkpoint(path, elements=ELEMENTS)


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task\.distillation\.teacher\.checkpoint: .*not exist"):
        Teacher.from_checkpoint(tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no_such_model"}, "cannot be built from its own config.*no_such_model"),
        ({"no_such_argument": 1, "name": "painn"}, "cannot be built from its own config"),
        ({"emb_size_atom": 16}, "do not fit the model of its own config"),
        ({"num_blocks": 1}, "do not fit the model of its own config"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    contents = read_checkpoint(checkpoint)
    contents["config"]["model"] |= change
    path = write_checkpoint(contents, tmp_path / "t.pt")
    with pytest.raises(UserError, match=message):
        Teacher.from_checkpoint(path, elements=ELEMENTS)


def test_an_element_outside_the_table_is_refused(checkpoint: Path) -> None:
    teacher = Teacher.from_checkpoint(checkpoint, elements=["H", "Np"])
    with pytest.raises(UserError, match=r"holds Np, which.*has the elements 1 to 83"):
        teacher.check_elements(torch.tensor([1.0, 93.0]))
    with pytest.raises(UserError, match=r"Z=0"):
        teacher.check_elements(torch.tensor([0, 1]))
    with pytest.raises(UserError, match="Z=1000"):
        teacher.check_elements(torch.tensor([1000]))


def test_the_last_element_of_each_table_is_known(tmp_path: Path, data: Path) -> None:
    for model, last in (("painn", 83), ("schnet", 99)):
        path = _checkpoint(tmp_path, data, model)
        teacher = Teacher.from_checkpoint(path, elements=range(1, 119))
        teacher.check_elements(torch.arange(1, last + 1))
        with pytest.raises(UserError, match=f"1 to {last}"):
            teacher.check_elements(torch.tensor([last + 1]))


def test_an_element_that_the_config_does_not_name_is_refused(checkpoint: Path) -> None:
    teacher = Teacher.from_checkpoint(checkpoint, elements=["H", "29"])
    teacher.check_elements(torch.tensor([1, 29]))
    with pytest.raises(UserError, match=r"holds O, Pt, which.*trained on H Cu"):
        teacher.check_elements(torch.tensor([1, 78, 8, 29]))


@pytest.mark.parametrize("named", [["H", "Cu"], [1, 29]])
def test_an_element_that_the_card_does_not_name_is_refused(
    tmp_path: Path, checkpoint: Path, named: list[Any]
) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(checkpoint.read_bytes())
    path.with_suffix(".json").write_text(json.dumps({"elements": named}))
    teacher = Teacher.from_checkpoint(path)
    teacher.check_elements(torch.tensor([1, 29]))
    with pytest.raises(UserError, match="holds O"):
        teacher.check_elements(torch.tensor([8]))


def test_without_a_list_of_elements_there_is_one_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.from_checkpoint(checkpoint)
        teacher.check_elements(torch.tensor([1, 83]))
    warnings = [r for r in caplog.records if "not known which elements" in r.getMessage()]
    assert len(warnings) == 1
    with pytest.raises(UserError, match="1 to 83"):
        teacher.check_elements(torch.tensor([84]))


@pytest.mark.parametrize(
    ("card", "message"),
    [("{", "is not JSON"), ('{"elements": ["H", "Xx"]}', "'Xx', which is no chemical")],
)
def test_a_card_that_makes_no_sense_is_refused(
    tmp_path: Path, checkpoint: Path, card: str, message: str
) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(checkpoint.read_bytes())
    path.with_suffix(".json").write_text(card)
    with pytest.raises(UserError, match=message):
        Teacher.from_checkpoint(path)


def test_outputs_that_it_does_not_give_are_refused(tmp_path: Path, data: Path) -> None:
    teacher = Teacher.from_checkpoint(
        _checkpoint(tmp_path, data, "painn_energy"), elements=ELEMENTS
    )
    teacher.require_outputs(["energy"])
    with pytest.raises(UserError, match="does not predict 'forces'"):
        teacher.require_outputs(["energy", "forces"])


def test_elements_are_read_from_symbols_and_numbers() -> None:
    assert as_atomic_numbers(["H", "29", 8], "x") == [1, 29, 8]
    assert as_atomic_numbers("H,Cu O", "x") == [1, 29, 8]
    with pytest.raises(UserError, match=r"x has 'Hx'"):
        as_atomic_numbers(["Hx"], "x")
    with pytest.raises(UserError, match="119"):
        as_atomic_numbers([119], "x")


def test_a_hydra_makes_its_own_graph_and_needs_no_other_file() -> None:
    backbone = {"model": "painn_backbone", "otf_graph": False, "scale_file": "elsewhere.pt"}
    hydra = {"name": "hydra", "backbone": backbone, "heads": {}, "otf_graph": False}
    hydra["finetune_config"] = {"starting_checkpoint": "elsewhere.pt"}
    expected = {"model": "painn_backbone", "otf_graph": True}
    built = model_config({"model": hydra})
    assert built == {"name": "hydra", "backbone": expected, "heads": {}, "otf_graph": True}
