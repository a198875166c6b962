"""Several teachers that speak as one: mean, spread, what structures weigh by it, and refusals."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import (
    assert_equal,
    config,
    count_asked,
    trainer,
    weights,
    write_lmdb,
    write_teacher,
    write_yaml,
)
from trainings import data as data

from fairchem_kd.commands.main import main
from fairchem_kd.distillation.config import parse_distillation
from fairchem_kd.distillation.ensembles import EnsembleOptions, Spreads
from fairchem_kd.distillation.opening import open_teacher
from fairchem_kd.errors import UserError
from fairchem_kd.stock.structures import pick
from fairchem_kd.teachers import EnsembleTeacher, LiveTeacher
from fairchem_kd.teachers.contents import contents
from fairchem_kd.teachers.place import FOLDER
from fairchem_kd.training.records import read_records

WHERE = "task.distillation.teacher.ensemble"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[str]:
    """Two PaiNNs that differ by their seed, and a SchNet."""
    root = tmp_path_factory.mktemp("members")
    made = []
    for number, (model, seed) in enumerate((("painn", 7), ("painn", 8), ("schnet", 9))):
        path = write_teacher(root / str(number), data, model, seed=seed)
        made.append(str(path.rename(root / f"{model}_{seed}.pt")))
    return made


def given(root: Path, data: Path, members: list[str], **more: Any) -> dict[str, Any]:
    """A training with an ensemble: its outputs, and a feature of one of them."""
    own = {"checkpoint": members, **more.pop("own", {})}
    losses = more.pop("losses", {"vanilla": {}, "n2n": {}, "per_atom_energy": {}})
    return config(root, data, distillation={"teacher": own, "losses": losses, **more})


def ensemble(members: list[str], **own: Any) -> EnsembleTeacher:
    block = {"teacher": {"checkpoint": members, **own}, "losses": {"vanilla": {}}}
    made = open_teacher(parse_distillation({"distillation": block}).teacher, torch.device("cpu"))
    assert isinstance(made, EnsembleTeacher)
    return made


def test_mean_and_spread_are_those_of_loops(tmp_path: Path, data: Path, members: list[str]) -> None:
    teacher = ensemble(members)
    with trainer(given(tmp_path, data, members)) as built:
        batch = built.collater([built.train_dataset[i] for i in range(3)])
    said = teacher.teach(batch, [])
    alone = [one.teach(batch, []).outputs for one in teacher.lives]
    atom = 0
    for system, number in enumerate(batch.natoms.tolist()):
        energies = [float(one["energy"][system]) for one in alone]
        assert float(said.outputs["energy"][system]) == pytest.approx(np.mean(energies))
        assert float(said.spread["energy"][system]) == pytest.approx(np.std(energies, ddof=1))
        squares = []
        for row in range(atom, atom + number):
            for axis in range(3):
                forces = [float(one["forces"][row, axis]) for one in alone]
                assert float(said.outputs["forces"][row, axis]) == pytest.approx(np.mean(forces))
                squares.append(np.var(forces, ddof=1))
        assert float(said.spread["forces"][system]) == pytest.approx(np.mean(squares) ** 0.5)
        atom += number
    # a structure's answer is its own, whatever shares the batch and in which order
    turned = teacher.teach(pick(batch, [2, 0, 1]), []).spread["forces"]
    torch.testing.assert_close(turned, said.spread["forces"][[2, 0, 1]], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(said.of([2, 0]).spread["energy"], said.spread["energy"][[2, 0]])


def test_features_are_of_the_one_that_is_named(data: Path, members: list[str]) -> None:
    first, last = ensemble(members), ensemble(members, ensemble={"features": members[2]})
    assert (first.lead, last.lead) == (0, 2)
    assert first.identity != last.identity
    assert first.energy_name == "energy"


def test_what_a_structure_weighs_is_the_formula() -> None:
    options = EnsembleOptions(weights=True, floor={"energy": 0.2}, limit={"forces": 0.5})
    spreads = Spreads(options, ["energy", "forces"], ["energy", "forces"])
    spreads.load_state_dict({"ratios": {"energy": 2.0}, "usual": {"energy": 0.4, "forces": 0.3}})
    seen = {"energy": torch.tensor([0.0, 0.2, 5.0]), "forces": torch.tensor([0.3, 0.5, 0.6])}

    class Said:
        spread = seen
        natoms = torch.tensor([1, 1, 1])

    counting, found, noted = spreads.weigh(Said(), torch.tensor([True, False, True]))  # type: ignore[arg-type]
    for own, spread in zip(found["energy"].tolist(), [0.0, 0.4, 10.0], strict=True):
        assert own == pytest.approx((0.2**2 + 0.4**2) / (0.2**2 + spread**2))
    for own, spread in zip(found["forces"].tolist(), [0.3, 0.5, 0.6], strict=True):
        assert own == pytest.approx((2 * 0.3**2) / (0.3**2 + spread**2))
    assert counting is not None
    assert counting.tolist() == [True, False, False]
    assert float(noted["masked"].total) / float(noted["masked"].count) == 0.5  # type: ignore[arg-type]
    assert float(noted["spread_energy"].total) == pytest.approx(10.0)


def test_ratios_are_those_of_errors_to_spreads(
    tmp_path: Path, data: Path, members: list[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "disable", lambda *_: None)
    with caplog.at_level(logging.INFO), trainer(given(tmp_path, data, members)) as built:
        teacher = built.make_distillation()
        spreads = built.distillation.spreads
        spreads.fit(teacher, [], built.train_dataset, built.collater, built.device)
        squares: dict[str, list[float]] = {"error": [], "spread": []}
        for index in range(len(built.train_dataset)):
            batch = built.collater([built.train_dataset[index]])
            said = teacher.teach(batch, [])
            error = (said.outputs["forces"] - batch.forces).square().mean()
            squares["error"].append(float(error))
            squares["spread"].append(float(said.spread["forces"]) ** 2)
    ratio = (np.mean(squares["error"]) / np.mean(squares["spread"])) ** 0.5
    assert spreads.ratios["forces"] == pytest.approx(ratio, rel=1e-3)
    assert spreads.usual["forces"] == pytest.approx(np.mean(squares["error"]) ** 0.5, rel=1e-3)
    (line,) = [m for m in caplog.messages if "The ensemble's forces" in m]
    assert "rank correlation" in line


def test_a_training_with_an_ensemble_from_stores_goes_on_bit_for_bit(
    tmp_path: Path, data: Path, members: list[str]
) -> None:
    """Live the first time; then from the stores, whole, and in two parts."""
    more = write_lmdb(tmp_path / "more", 4, seed=90)
    options = {"weights": True, "limit": {"forces": 1e3}, "features": members[1]}
    arguments = given(
        tmp_path, data, members, own={"ensemble": options},
        rattle={"copies": 0.5, "pool": 2},
        unlabelled={"dataset": {"format": "lmdb", "src": str(more)}},
    )  # fmt: skip
    arguments["optimizer"]["checkpoint_every"] = 3
    with trainer(arguments, timestamp_id="whole") as built:
        built.train(disable_eval_tqdm=True)
        end, fitted = weights(built), built.distillation.spreads.state_dict()
        place = Path(built.config["cmd"]["checkpoint_dir"])
        assert len(built.distillation.teacher.stores) == 3
    assert len(list((tmp_path / FOLDER).iterdir())) == 3
    first = next(record for record in read_records(place) if record["kind"] == "train")["metrics"]
    assert first["spread_energy"] > 0
    assert first["spread_forces"] > 0
    assert first["masked"] == 0
    with trainer(arguments, timestamp_id="broken") as built:
        built.config["optim"]["max_epochs"] = 1
        built.train(disable_eval_tqdm=True)
    with trainer(arguments, timestamp_id="broken") as built:
        built.train(disable_eval_tqdm=True)
        assert built.distillation.spreads.state_dict() == fitted
        assert_equal(weights(built), end)


def test_the_stores_of_an_ensemble_are_filled_and_shown_by_the_command(
    tmp_path: Path, data: Path, members: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And a teacher alone reads what it said as a member."""
    monkeypatch.chdir(tmp_path)
    own = {"store": "stores", "ensemble": {"features": members[1]}}
    write_yaml(tmp_path / "config.yml", given(tmp_path, data, members[:2], own=own))
    assert main(["teach", "config.yml", "--cpu"]) == 0
    out = capsys.readouterr().out
    folders = sorted(path.name for path in Path("stores").iterdir())
    assert len(folders) == 2
    for member, folder in zip(members, sorted(folders, key=out.index), strict=False):
        assert f"stores/{folder}: 11 structures" in out
        assert f"teacher {member} " in out
    assert out.count("feature:node:node") == 1  # of the one whose features count
    asked = count_asked(monkeypatch)
    (alone,) = [f for f in folders if "feature:node:node" in contents(Path("stores") / f)]
    teacher = {"checkpoint": members[1], "store": f"stores/{alone}"}
    single = config(tmp_path, data, distillation={"teacher": teacher, "losses": {"n2n": {}}})
    with trainer(single) as built:
        built.set_up()
    assert sum(asked) <= 5  # a look at whether the store still holds


def test_masked_structures_teach_nothing(tmp_path: Path, data: Path, members: list[str]) -> None:
    options = {"limit": {"forces": 1e-9}}
    masked = given(tmp_path / "a", data, members, own={"ensemble": options, "store": "off"})
    plain = config(tmp_path / "b", data, losses=None)
    with trainer(masked) as built:
        built.train(disable_eval_tqdm=True)
        end = weights(built)
    with trainer(plain) as built:
        built.train(disable_eval_tqdm=True)
        assert_equal(weights(built), end)


def test_nan_of_one_member_is_not_trusted(data: Path, members: list[str]) -> None:
    teacher = ensemble(members)
    said = [_said(1.0), _said(float("nan")), _said(2.0)]
    found = teacher.combined(said).sound(["energy"])
    assert found.trusted is not None
    assert found.trusted.tolist() == [False, True]
    assert bool(torch.isfinite(found.spread["energy"]).all())


def _said(energy: float) -> Any:
    from fairchem_kd.teachers import Taught

    outputs = {"energy": torch.tensor([[energy], [1.0]]), "forces": torch.zeros(2, 3)}
    return Taught(torch.tensor([1, 1]), outputs, {})


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"checkpoint": ["a.pt", "./a.pt"]}, r"checkpoint\[1\]: ./a.pt is the same file as a.pt"),
        ({"checkpoint": ["a.pt", None]}, "must be"),
        ({"checkpoint": ["a.pt", ""]}, r"checkpoint\[1\] is empty"),
        ({"checkpoint": 5}, "checkpoint must be text, not 5"),
        ({"checkpoint": []}, "checkpoint is required"),
        ({"checkpoint": "a.pt", "ensemble": {}}, "names fewer than two"),
        ({"checkpoint": ["a.pt"], "ensemble": {"weights": True}}, "names fewer than two"),
        ({"checkpoint": "[a.pt, b.pt]", "ensemble": {"features": "c.pt"}}, "is 'c.pt', which is"),
        ({"checkpoint": ["a", "b"], "ensemble": {"floor": {"energy": 1}}}, "weights: true"),
        ({"checkpoint": ["a", "b"], "ensemble": {"limit": {"forces": 0}}}, "greater than 0"),
        ({"checkpoint": ["a", "b"], "ensemble": {"limit": {"forces": "nan"}}}, "a number"),
        ({"checkpoint": ["a", "b"], "ensemble": {"limit": 1}}, "limit must be a mapping"),
        ({"checkpoint": ["a", "b"], "ensemble": {"weights": 2}}, "true or false"),
        ({"checkpoint": ["a", "b"], "ensemble": {"samples": 1}}, "at least 8"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_distillation({"distillation": {"teacher": teacher, "losses": {"vanilla": {}}}})


def test_members_that_do_not_go_together_are_refused(
    tmp_path: Path, data: Path, members: list[str]
) -> None:
    twin = shutil.copy(members[0], tmp_path / "twin.pt")
    with pytest.raises(UserError, match=r"checkpoint\[1\]: .*twin.pt is the same teacher as"):
        ensemble([members[0], str(twin)])
    one, two = (ensemble(members).lives[i] for i in (0, 1))
    del two.frozen.outputs["forces"]
    with pytest.raises(UserError, match=r"checkpoint\[1\]: .*does not predict 'forces'"):
        EnsembleTeacher([one, two])
    with pytest.raises(UserError, match=r"checkpoint\[1\]: .*nowhere"):
        ensemble([members[0], "nowhere.pt"])


def test_elements_that_one_member_does_not_know_are_refused(members: list[str]) -> None:
    teacher = ensemble(members)
    frozen = teacher.lives[1].frozen
    frozen._known[29] = False
    with pytest.raises(UserError, match=r"Cu, which .*painn_8"):
        teacher.check_elements(torch.tensor([1, 29]))


@pytest.mark.parametrize(
    ("options", "losses", "words"),
    [
        ({"limit": {"force": 1}}, {"vanilla": {}}, r"limit has 'force'.*did you mean 'forces'"),
        ({"weights": True, "floor": {"energy": 1}}, {"vanilla": {"energy": 0}}, "no loss compares"),
        ({"weights": True}, {"n2n": {}}, "is of losses on outputs, and there is none"),
    ],
)
def test_options_that_do_not_fit_the_losses_are_refused(
    tmp_path: Path, data: Path, members: list[str], options: Any, losses: Any, words: str
) -> None:
    arguments = given(tmp_path, data, members, own={"ensemble": options}, losses=losses)
    with trainer(arguments) as built, pytest.raises(UserError, match=words):
        built.make_distillation()


def test_other_zeros_and_no_spread_at_all_are_refused(
    tmp_path: Path, data: Path, members: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_lmdb(tmp_path / "many" / "train", 24, seed=0).parent
    shutil.copytree(data / "val", more / "val")
    teach = LiveTeacher.teach

    def shifted(self: LiveTeacher, batch: Any, requests: Any, **given: Any) -> Any:
        said = teach(self, batch, requests, **given)
        if "painn_8" in self.name:
            said.outputs["energy"].add_(50.0 * batch.natoms.view(-1, 1))  # type: ignore[attr-defined]
        return said

    with trainer(given(tmp_path, more, members[:2])) as built:
        teacher = built.make_distillation()
        spreads = built.distillation.spreads
        arguments = (teacher, [], built.train_dataset, built.collater, built.device)
        with monkeypatch.context() as patch:
            patch.setattr(LiveTeacher, "teach", shifted)
            with pytest.raises(UserError, match="members have different zeros"):
                spreads.fit(*arguments)
        teacher.members[1] = teacher.members[0]
        with pytest.raises(UserError, match="say the same"):
            spreads.fit(*arguments)
