"""Any target of structures or atoms distils, each in units of its own, against loops in float64."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from commands import Command
from fairchem.core.modules.loss import DDPLoss
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.trainers import OCPTrainer
from models import fit_scales, model_config, small_model
from terms import FREE, NATOMS, WHERE, batch, compare, generator, mean, random
from trainings import config, trainer, write_lmdb, write_yaml

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureExtractor, atom_energy, available_features, energy_name_of
from fairchem_kd.losses import Labels, LossInputs, loss_class
from fairchem_kd.models.frozen import Teacher, given_outputs
from fairchem_kd.models.units import Units
from fairchem_kd.training.records import read_records

#: mean and rmsd of the student's normalisers and of the teacher's.
OWN = {"energy": (10.0, 2.0), "forces": (0.0, 1.5), "virial": (-30.0, 20.0), "charge": (5.0, 3.0)}
THEIRS = {"energy": (8.0, 3.0), "forces": (0.0, 2.0), "virial": (15.0, 7.0), "charge": (4.0, 0.5)}
COEFFICIENTS = {"virial": 3.0, "charge": 5.0}


def labels_of(atoms: Atoms) -> dict[str, Any]:
    """The trace of EMT's virial in eV, and a smooth number of neighbours of each atom."""
    distances = atoms.get_all_distances(mic=True)
    near = np.exp(-((distances / 2.5) ** 4)).sum(axis=1) - 1
    virial = -float(atoms.get_stress(voigt=False).trace() * atoms.get_volume())
    return {"virial": virial, "charge": torch.tensor(near, dtype=torch.float32)}


def hydra(hidden: int = 16) -> dict[str, Any]:
    """PaiNN with energy, forces, another sum over atoms, and a number for each atom."""
    block = model_config("painn_hydra", pass_through_head_outputs=False)
    block["backbone"]["hidden_channels"] = hidden
    block["heads"] |= {
        "virial": {"module": "painn_energy_head"},
        "charge": {"module": "heads.AtomHead"},
    }
    return block


def arguments_of(
    root: Path, data: Path, norms: dict[str, tuple[float, float]], **more: Any
) -> dict[str, Any]:
    """A training of all four targets."""
    arguments = config(root, data, **more)
    arguments["model"] = hydra()
    everywhere = {"train_on_free_atoms": False, "eval_on_free_atoms": False}
    arguments["outputs"]["energy"]["property"] = "energy"
    arguments["outputs"]["forces"]["property"] = "forces"
    arguments["outputs"] |= {
        "virial": {"level": "system", "property": "energy"},
        "charge": {"level": "atom", "property": "charge", **everywhere},
    }
    arguments["loss_functions"] += [
        {"virial": {"fn": "mae", "coefficient": 4}},
        {"charge": {"fn": "mse", "coefficient": 6}},
    ]
    arguments["evaluation_metrics"]["metrics"] |= {"virial": ["mae"], "charge": ["mae"]}
    arguments["dataset"]["train"]["transforms"]["normalizer"] = {
        name: {"mean": mean, "rmsd": rmsd} for name, (mean, rmsd) in norms.items()
    }
    return arguments


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_lmdb(root / "train", 6, seed=0, more=labels_of)
    write_lmdb(root / "val", 2, seed=50, more=labels_of)
    write_lmdb(root / "more", 3, seed=70)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    arguments = arguments_of(tmp_path_factory.mktemp("teacher"), data, THEIRS)
    with trainer(arguments, OCPTrainer, seed=7, identifier="teacher") as built:
        fit_scales(built.model)
        return Path(built.save(checkpoint_file="teacher.pt", training_state=False))


def distilling(root: Path, data: Path, teacher: Path, losses: dict[str, Any]) -> dict[str, Any]:
    trust = {"checkpoint": str(teacher), "trust_checkpoint": True}  # the head is not fairchem's
    return arguments_of(root, data, OWN, losses=losses, distillation={"teacher": trust})


# -- the formulas ---------------------------------------------------------------------------------

OUTPUTS: dict[str, dict[str, Any]] = {
    "energy": {"level": "system"},
    "forces": {"level": "atom", "train_on_free_atoms": True},
    "gap": {"level": "system"},
    "charge": {"level": "atom", "train_on_free_atoms": True},
}
WIDTHS = {"energy": 1, "forces": 3, "gap": 1, "charge": 1}


def label_losses(**fns: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, {"fn": DDPLoss(fn, "mean"), "coefficient": 1.0 + number})
        for number, (name, fn) in enumerate(fns.items())
    ]


def vanilla(losses: Any, taught: dict[str, str] | None = None, **options: Any) -> Any:
    term = loss_class("vanilla", WHERE).from_options(options, WHERE)
    term.build({}, {}, generator(), Labels(losses, OUTPUTS, taught))
    return term


def inputs() -> LossInputs:
    made = LossInputs(batch())
    rows = {"system": len(NATOMS), "atom": sum(NATOMS)}
    sides = (made.student_outputs, made.teacher_outputs)
    for seed, side in enumerate(sides):
        for number, (name, output) in enumerate(OUTPUTS.items()):
            values = random(rows[output["level"]], WIDTHS[name], seed=10 * seed + number)
            side[name] = values  # type: ignore[index]
    return made


@pytest.mark.parametrize("fn", ["mae", "mse"])
@pytest.mark.parametrize("free", [True, False])
def test_named_targets_equal_loops(fn: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTPUTS, "charge", {"level": "atom", "train_on_free_atoms": free})
    losses = label_losses(energy="mae", gap=fn, charge=fn)
    term = vanilla(losses, targets={"gap": 2.0, "charge": "0.5"})
    given = inputs()
    expected = 0.0
    for name, coefficient in (("gap", 2.0), ("charge", 0.5)):
        rows = [
            compare(fn, s - t)
            for row, (s, t) in enumerate(
                zip(given.student_outputs[name], given.teacher_outputs[name], strict=True)
            )
            if name == "gap" or not free or FREE[row]
        ]
        expected += coefficient * sum(rows) / len(rows)
    assert float(mean(term(given))) == pytest.approx(expected, rel=1e-12)


def test_what_is_compared_follows_the_labels_and_the_teacher() -> None:
    losses = label_losses(energy="mae", forces="l2mae", gap="mae", charge="mse")
    everything = {name: output["level"] for name, output in OUTPUTS.items()}

    def compared(taught: dict[str, str] | None = None, **options: Any) -> dict[str, float]:
        return {part.name: part.weight for part in vanilla(losses, taught, **options)(inputs())}

    whole = {"energy": 1.0, "forces": 2.0, "gap": 3.0, "charge": 4.0}
    assert compared() == whole
    assert compared(everything) == whole
    assert compared(energy=7, forces=0) == {"energy": 7.0, "gap": 3.0, "charge": 4.0}
    assert compared({"gap": "system", "energy": "system"}) == {"energy": 1.0, "gap": 3.0}
    assert compared(everything, targets=["gap"]) == {"gap": 3.0}
    assert compared(everything, targets="[charge, gap]") == {"charge": 4.0, "gap": 3.0}
    assert compared(everything, targets={"gap": None, "forces": 0}) == {"gap": 3.0}


@pytest.mark.parametrize(
    ("options", "taught", "sentence"),
    [
        ({"targets": ["gapp"]}, None, r"targets has 'gapp', .* \(did you mean 'gap'\?\)"),
        ({"targets": ["gap"]}, {"energy": "system"}, r"targets.gap: the teacher does not predict"),
        (
            {"forces": 2},
            {"energy": "system"},
            r"term.forces: the teacher does not predict 'forces'",
        ),
        ({"targets": ["gap"]}, {"gap": "atom"}, "gap is of the level system in outputs"),
        ({"targets": ["charge"]}, None, "targets.charge is there, but loss_functions has no"),
        ({"targets": {"charge": 2}}, None, r"targets.charge is 2, but loss_functions has no"),
        ({"targets": ["gap"], "energy": 1}, None, "has both targets and energy"),
        ({"targets": {"gap": -1}}, None, "at least 0"),
        ({"targets": {"gap": "x"}}, None, "targets.gap must be a number"),
        ({}, {"other": "system"}, "nor another target"),
    ],
)
def test_refusals(options: dict[str, Any], taught: dict[str, str] | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        vanilla(label_losses(energy="mae", forces="l2mae", gap="mae"), taught, **options)


@pytest.mark.parametrize("rmsd", [1.0, 10.0])
def test_shares_of_a_target_have_its_own_normaliser(rmsd: float) -> None:
    """Of one whose normaliser is ten times as wide, the normalised difference is a tenth."""
    normalizer = Normalizer(torch.tensor(4.0).double(), torch.tensor(rmsd).double())
    other = Normalizer(torch.tensor(-7.0).double(), torch.tensor(0.3).double())
    units = Units({"gap": normalizer, "energy": other}, {})
    natoms = torch.tensor(NATOMS)
    structures = batch()
    structures.batch = torch.repeat_interleave(torch.arange(3), natoms)
    student, physical = random(8, 1), random(8, 1, seed=1)
    term = loss_class("per_atom_energy", WHERE).from_options({"target": "gap"}, WHERE)
    term.build({}, {}, generator(), Labels([], OUTPUTS))
    given = LossInputs(structures, student_atom_energies={"gap": student})
    given.teacher_atom_energies = {
        "gap": units.normalized_atom_energies(physical, structures, "gap")
    }
    expected, atom = 0.0, 0
    for count in NATOMS:
        for _ in range(count):
            taught = (float(physical[atom]) - 4.0 / count) / rmsd
            expected += abs(float(student[atom]) - taught) / sum(NATOMS)
            atom += 1
    assert float(mean(term(given))) == pytest.approx(expected, rel=1e-9)


def test_which_output_has_shares() -> None:
    term = loss_class("per_atom_energy", WHERE).from_options({}, WHERE)
    assert term.compared_atom_energies(Labels([], OUTPUTS)) == ("energy",)
    assert term.compared_atom_energies(Labels([], OUTPUTS, energy="gap")) == ("gap",)
    with pytest.raises(UserError, match=r"name the output in .*term.target \(outputs has energy"):
        term.compared_atom_energies(Labels([], OUTPUTS, energy=None))
    for target, sentence in (("gab", "did you mean 'gap'"), ("charge", "an output of atoms")):
        named = loss_class("per_atom_energy", WHERE).from_options({"target": target}, WHERE)
        with pytest.raises(UserError, match=sentence):
            named.compared_atom_energies(Labels([], OUTPUTS))


# -- models ---------------------------------------------------------------------------------------


def two_heads(flavour: str, first: str, second: str) -> Any:
    block = model_config(flavour, pass_through_head_outputs=False)
    head = block["heads"].pop("energy")
    return {**block, "heads": {first: head, second: dict(head), **block["heads"]}}


@pytest.mark.parametrize("flavour", ["painn_hydra", "gemnet_oc_hydra"])
def test_a_hydra_with_several_sums_has_the_shares_of_each(flavour: str) -> None:
    model = small_model(flavour, **two_heads(flavour, "energy", "virial"))
    assert energy_name_of(model) == "energy"
    structures = slabs()
    wanted = [atom_energy("energy"), atom_energy("virial")]
    taps = FeatureExtractor(model, wanted)
    with torch.no_grad(), taps.capture() as features:
        out = model(structures)
    for name, request in zip(("energy", "virial"), wanted, strict=True):
        shares = features[request].values.squeeze(1)
        sums = shares.new_zeros(len(structures.natoms)).index_add(0, structures.batch, shares)
        torch.testing.assert_close(sums, out[name]["energy"].view(-1))
    assert not torch.allclose(features[wanted[0]].values, features[wanted[1]].values)
    if flavour.startswith("gemnet"):
        assert "x_E" in available_features(model)["node"].description  # of the head named energy
    unclear = small_model(flavour, **two_heads(flavour, "first", "second"))
    assert energy_name_of(unclear) is None
    with pytest.raises(UserError, match="name atom_energy@first, atom_energy@second"):
        FeatureExtractor(unclear, [atom_energy("energy")])
    FeatureExtractor(unclear, [atom_energy("second")])


def slabs() -> Any:
    from models import batch as slabs_of

    return slabs_of()


def test_a_tensor_is_given_as_its_irreps() -> None:
    parts = {"iso": {"irrep_dim": 0}, "aniso": {"irrep_dim": 2, "level": "atom"}}
    outputs = {"energy": {"level": "system"}, "stress": {"level": "system", "decomposition": parts}}
    assert dict(given_outputs(outputs)) == {
        "energy": {"level": "system"},
        "iso": {"irrep_dim": 0, "level": "system"},
        "aniso": {"irrep_dim": 2, "level": "atom"},
    }


def test_an_output_that_the_model_does_not_give_is_named() -> None:
    model = small_model("painn_hydra", pass_through_head_outputs=False)
    wrong = Teacher(model, Units({}, {}), {"energy": {"level": "system", "property": "enrgy"}})
    with pytest.raises(UserError, match=r"'energy', but its model gives energy.energy, forces.fo"):
        wrong.forward(slabs())


# -- trainings ------------------------------------------------------------------------------------


def test_a_training_compares_all_in_physical_units(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    losses = {
        "vanilla": {"targets": COEFFICIENTS},
        "shares": {"kind": "per_atom_energy", "target": "virial", "coefficient": 7.0},
    }
    with trainer(distilling(tmp_path, data, teacher, losses)) as built:
        built.set_up()
        built.model.train()
        structures = next(iter(built.train_loader))
        out = built._forward(structures)
        loss = built._compute_loss(out, structures)
        values = built.distillation.values.read()
        model = Teacher.from_checkpoint(str(teacher), trust=True).model
        with torch.no_grad():
            labels = OCPTrainer._compute_loss(built, out, structures)
            taps = FeatureExtractor(model, [atom_energy("virial")])
            with taps.capture() as said:
                taught = model(structures)
            mine = FeatureExtractor(built._unwrapped_model, [atom_energy("virial")])
            with mine.capture() as own:
                built._unwrapped_model(structures)
        stored = list((tmp_path / "teacher_stores").glob("*"))
        assert len(stored) == 1  # the answers came out of a store
        assert {"output:virial", "output:charge", "atom_energy:virial"} <= set(
            built.distillation.teacher.names
        )
        natoms = structures.natoms[structures.batch].tolist()
    expected = {"vanilla.virial": 0.0, "vanilla.charge": 0.0, "shares": 0.0}
    for system, theirs in enumerate(taught["virial"]["energy"].double().tolist()):
        ours = out["virial"][system].item()
        difference = (theirs * 7.0 + 15.0 + 30.0) / 20.0 - ours
        expected["vanilla.virial"] += abs(difference) / len(structures.natoms)
    for atom, theirs in enumerate(taught["charge"]["charge"].double().tolist()):
        difference = (theirs * 0.5 + 4.0 - 5.0) / 3.0 - out["charge"][atom].item()
        expected["vanilla.charge"] += difference**2 / len(natoms)
        share = said[atom_energy("virial")].values[atom].item() * 7.0 + 15.0 / natoms[atom]
        share = (share + 30.0 / natoms[atom]) / 20.0
        own_share = own[atom_energy("virial")].values[atom].item()
        expected["shares"] += abs(share - own_share) / len(natoms)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name
    assert "vanilla.energy" not in values
    whole = sum(
        weight * expected[name]
        for name, weight in (("vanilla.virial", 3.0), ("vanilla.charge", 5.0), ("shares", 7.0))
    )
    assert loss.item() - labels.item() == pytest.approx(whole, rel=1e-5)


def test_the_command_trains_with_any_target_and_few_labels(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Labels of a few structures, and the teacher's word on them and on others."""
    arguments = distilling(tmp_path, data, teacher, {"vanilla": {}})
    arguments["dataset"]["train"]["train_split_settings"] = {"first_n": 3}
    unlabelled = {"format": "lmdb", "src": str(data / "more")}
    arguments["task"]["distillation"] |= {
        "unlabelled": {"dataset": unlabelled, "share": 0.4},
        "rattle": {"copies": 0.5, "std": 0.05},
    }
    arguments["optimizer"] |= {"max_epochs": 3, "eval_every": 1}
    write_yaml(tmp_path / "run.yml", arguments)
    argv = ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu", "--print-every", "1"]
    Command([*argv, "--run-dir", str(tmp_path)], tmp_path, tmp_path / "log").finish()
    (folder,) = (tmp_path / "checkpoints").glob("*/records.jsonl")
    first, *_, last = (record["metrics"] for record in read_records(folder.parent, "train"))
    for name in ("energy", "forces", "virial", "charge"):
        assert first[f"vanilla.{name}"] > 0
        assert last[f"{name}_mae"] > 0
    assert first["vanilla.virial_weighted"] == pytest.approx(4 * first["vanilla.virial"])
    log = (tmp_path / "log").read_text()
    assert "own labels: energy" in log
    assert "virial" in log.partition("own labels:")[2].splitlines()[0]


def test_what_the_teacher_lacks_is_said_or_refused(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    arguments = distilling(tmp_path, data, teacher, {"vanilla": {"targets": {"spin": 1.0}}})
    with trainer(arguments) as built, pytest.raises(UserError, match="targets has 'spin'"):
        built.set_up()
    arguments = distilling(tmp_path, data, teacher, {"vanilla": {}})
    with trainer(arguments) as built:
        built.make_distillation()
        lacking = copy.copy(built.distillation.teacher.frozen.outputs)
        del lacking["charge"]
    contents = torch.load(teacher, weights_only=False)
    contents["config"]["outputs"] = lacking
    gc.collect()
    torch.save(contents, tmp_path / "lacking.pt")
    arguments = distilling(tmp_path, data, tmp_path / "lacking.pt", {"vanilla": {}})
    with trainer(arguments) as built:
        built.make_distillation()
        assert built.distillation.not_taught == ["charge"]
        assert built.distillation._outputs == ["energy", "forces", "virial"]
    arguments["task"]["distillation"]["losses"] = {"vanilla": {"targets": ["charge"]}}
    with (
        trainer(arguments) as built,
        pytest.raises(UserError, match=r"targets.charge: the teacher does not predict 'charge'"),
    ):
        built.make_distillation()


def test_a_run_from_before_there_were_more_targets_goes_on(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    losses = {"vanilla": {}, "per_atom_energy": {}}
    with trainer(distilling(tmp_path, data, teacher, losses)) as built:
        built.make_distillation()
        state = copy.deepcopy(built.distillation.state_dict())
        del state["identity"]["losses"]["vanilla"]["targets"]
        del state["identity"]["losses"]["per_atom_energy"]["target"]
        del state["identity"]["teacher.energy_zero"]
        built.distillation.load_state_dict(state)
        state["identity"]["losses"]["vanilla"]["targets"] = ["energy"]
        with pytest.raises(UserError, match=r"losses: this run was started with another"):
            built.distillation.load_state_dict(state)
