"""``fairchem-kd accept``: bars that are met, unmet and not measured, and the exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import ROOT
from models import fit_scales
from trainings import config, inside, trainer, write_home

from fairchem_kd.analysis.accept.bars import FIGURES, USES, bars_for, read_bars
from fairchem_kd.analysis.accept.measure import Value, _figure, _worst
from fairchem_kd.analysis.accept.study import MET, NOT_MEASURED, UNMET, Verdict
from fairchem_kd.analysis.compare.gap import gap_closed
from fairchem_kd.analysis.physics.dynamics import Dynamics
from fairchem_kd.analysis.physics.measure import Consistency, Relaxation
from fairchem_kd.analysis.physics.study import Physics, Settings
from fairchem_kd.analysis.physics.summary import STATISTICS, Findings
from fairchem_kd.commands import main as cli
from fairchem_kd.commands.accept import _USES
from fairchem_kd.errors import UserError
from fairchem_kd.md import Exploded

SHORT = ["--structures", "2", "--md-steps", "4", "--relax-steps", "3", "--cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """data/test with labels, teacher.pt, and the untrained students plain.pt and energies.pt."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home({"train": 4, "val": 2, "test": 4}, model="painn")
        for name, model in (("plain", "painn"), ("energies", "painn_energy")):
            arguments = config(Path("runs"), Path("data"), model=model)
            if name == "energies":
                del arguments["outputs"]["forces"]
                arguments["loss_functions"] = arguments["loss_functions"][:1]
                arguments["evaluation_metrics"] = {"metrics": {"energy": ["mae"]}}
            with trainer(arguments, seed=len(name)) as built:
                fit_scales(built.model)
                path = built.save(checkpoint_file=f"{name}.pt", training_state=False)
            Path(path).rename(f"{name}.pt")
        yield root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def bars(**limits: Any) -> Path:
    path = Path("bars.yml")
    path.write_text(json.dumps(limits))  # which is YAML too
    return path


def accepted(*more: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["accept", "plain.pt", "--bars", "bars.yml", *SHORT, "--out", "out", *more])
    found = json.loads(Path("out/accept.json").read_text())
    return code, {one["figure"]: one for one in found["bars"]} | {"accepted": found["accepted"]}


def test_loose_bars_of_every_kind_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    loose = {n: 0.0 if f.sense == "at least" else 1e9 for n, f in FIGURES.items()}
    loose |= {"energy_gap_closed": -1e9, "forces_gap_closed": -1e9}
    loose |= {"forces_cosine_similarity": 0.0}
    bars(**loose)
    teacher = ["--teacher", "teacher.pt", "--baseline", "plain.pt", "--method", "emt"]
    code, found = accepted(*teacher, "--split", "data/test")
    text = capsys.readouterr().out
    outcomes = {name: found[name]["outcome"] for name in FIGURES}
    # of untrained models: the teacher may be worse than the student, and its forces point anywhere
    may_fail = {"energy_gap_closed", "forces_gap_closed", "forces_cosine_similarity"}
    assert {o for n, o in outcomes.items() if n not in may_fail} == {MET}
    assert code == (0 if found["accepted"] else 1)
    assert "md_speedup" in text
    assert f"{'' if found['accepted'] else 'not '}accepted" in text
    assert found["md_speedup"]["value"] > 0
    assert "### Acceptance" in Path("out/accept.md").read_text()
    errors = {n: found[n]["value"] for n in ("energy_mae", "energy_mae_per_atom")}
    assert errors["energy_mae"] > errors["energy_mae_per_atom"] > 0


def test_bars_out_of_reach_are_unmet(capsys: pytest.CaptureFixture[str]) -> None:
    bars(energy_mae=0, forces_mae=0.0, forces_cosine_similarity=1)
    code, found = accepted("--split", "one=data/test")
    assert code == 1
    assert [found[n]["outcome"] for n in ("energy_mae", "forces_mae")] == [UNMET, UNMET]
    assert found["energy_mae"]["where"] == "one"
    assert "is not accepted: 0 of 3 bars are met" in capsys.readouterr().out


def test_what_is_not_measured_is_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    bars(md_speedup=0, energy_gap_closed=-9, relax_energy_above=1e9, md_steps_per_second=0)
    code, found = accepted("--split", "data/test", "--data", "data/test", "--method", "none")
    assert code == 1
    reasons = {n: one["why"] for n, one in found.items() if isinstance(one, dict)}
    assert "name it with --teacher" in reasons["md_speedup"]
    assert "name it with --teacher" in reasons["energy_gap_closed"]
    assert "give --method" in reasons["relax_energy_above"]
    assert found["md_steps_per_second"]["outcome"] == MET
    bars(energy_gap_closed=-9)
    _, found = accepted("--split", "data/test", "--teacher", "teacher.pt")
    assert "--baseline" in found["energy_gap_closed"]["why"]
    capsys.readouterr()


def test_nothing_is_measured_that_no_bar_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nobody asked for that")

    for name in ("relax", "check_forces", "scan_bond", "method_calculator"):
        monkeypatch.setattr(f"fairchem_kd.analysis.physics.study.{name}", never)
    bars(md_stable=0)
    code, found = accepted("--data", "data/test", "--method", "emt")
    assert (code, found["md_stable"]["outcome"]) == (0, MET)
    bars(relax_steps=1e9)
    with pytest.raises(AssertionError):
        accepted("--data", "data/test", "--method", "emt")


def test_a_student_that_explodes_while_its_speed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise Exploded("it has exploded")

    monkeypatch.setattr("fairchem_kd.analysis.accept.measure.measure_md", explode)
    bars(md_steps_per_second=0, md_stable=0)
    code, found = accepted("--data", "data/test")
    assert code == 1
    assert found["md_steps_per_second"]["outcome"] == NOT_MEASURED
    assert found["md_steps_per_second"]["why"] == "it has exploded"
    assert found["md_stable"]["outcome"] == MET


def findings(*lasting: bool, ends: tuple[float | None, ...] = ()) -> Findings:
    """Dynamics that last without drift or break at once, and relaxations that end so high."""
    return Findings(
        dynamics=[
            Dynamics([0.0] * 9, 0.5, 8, stable=True, reason="")
            if good
            else Dynamics([0.0] * 4, 0.5, 8, stable=False, reason="too hot")
            for good in lasting
        ],
        relaxations=[Relaxation(True, 1, end, end) for end in ends],
        consistency=[
            Consistency([1.0], [1.0]) if good else Consistency([], []) for good in lasting
        ],
    )


@pytest.mark.parametrize(
    ("name", "lasting", "value", "why"),
    [
        ("md_drift", (True, True, True), 0.0, ""),
        ("md_drift", (True, False, True), 0.0, "1 of 3 runs do not last (too hot), and count as"),
        ("md_drift", (False, False, True), None, "2 of 3 runs do not last (too hot)"),
        ("md_fluctuation", (False, False), None, "2 of 2 runs do not last (too hot)"),
        ("force_mismatch", (True, True), 0.0, ""),
        ("force_mismatch", (True, False), None, "1 of 2 structures gave none"),
        ("force_mismatch_relative", (True, False), None, "1 of 2 structures gave none"),
        ("force_mismatch_relative", (True, True), 0.0, ""),
        ("force_mismatch", (False, False), None, "no structure gave a value"),
    ],
)
def test_what_a_student_cannot_do_counts_as_the_worst(
    name: str, lasting: tuple[bool, ...], value: float | None, why: str
) -> None:
    physics = Physics(None, "data", len(lasting), Settings(), {"student": [findings(*lasting)]})
    found = _figure(physics, name, physics.summary("student")[name])
    assert found.value == (None if value is None else pytest.approx(value, abs=1e-12))
    assert found.why.startswith(why)
    assert bool(found.why) == bool(why)


def test_what_the_method_cannot_say_counts_for_nobody() -> None:
    def of(ours: tuple[float | None, ...], method: tuple[float | None, ...]) -> Value:
        models = {"student": [findings(ends=ours)], "EMT": [findings(ends=method)]}
        physics = Physics("EMT", "data", len(ours), Settings(), models)
        name = "relax_energy_above"
        return _figure(physics, name, physics.summary("student")[name])

    assert of((0.1, 0.3, None), (0.0, 0.0, None)).value == pytest.approx(0.2)
    some = of((0.1, 0.3, None), (0.0, 0.0, 0.0))
    assert (some.value, some.why[:6]) == (pytest.approx(0.3), "1 of 3")
    assert of((0.1, None), (0.0, 0.0)).value is None
    assert of((0.1, None), (None, None)).why == "no structure gave a value"


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_an_error_that_is_not_finite_is_no_error(order: tuple[str, str]) -> None:
    errors = {"a": float("nan"), "b": 0.1}
    found = _worst({name: errors[name] for name in order}, smallest=False)
    assert (found.value, found.why) == (None, "on a it is not finite")


def test_without_forces_dynamics_are_not_measured() -> None:
    bars(md_drift=1, forces_mae=9, energy_mae=1e9)
    argv = ["accept", "energies.pt", "--bars", "bars.yml", "--split", "data/test", *SHORT, "--json"]
    assert cli.main([*argv, "--out", "out"]) == 1
    found = {one["figure"]: one for one in json.loads(Path("out/accept.json").read_text())["bars"]}
    assert found["md_drift"]["outcome"] == found["forces_mae"]["outcome"] == NOT_MEASURED
    assert found["energy_mae"]["outcome"] == MET


@pytest.mark.parametrize(
    ("name", "value", "limit", "outcome"),
    [
        ("forces_mae", 0.05, 0.05, MET),
        ("forces_mae", 0.0501, 0.05, UNMET),
        ("md_stable", 1.0, 1.0, MET),
        ("md_stable", 0.8, 1.0, UNMET),
        ("md_drift", float("nan"), 1.0, NOT_MEASURED),
        ("md_drift", float("inf"), 1.0, UNMET),
        ("md_drift", None, 1.0, NOT_MEASURED),
    ],
)
def test_verdicts(name: str, value: float | None, limit: float, outcome: str) -> None:
    assert Verdict(name, limit, Value(value)).outcome == outcome


def test_the_sets_by_use_name_known_figures() -> None:
    assert tuple(USES) == _USES
    for limits in USES.values():
        assert limits.keys() <= FIGURES.keys()
    physics = {name for name, figure in FIGURES.items() if figure.group == "physics"}
    assert physics <= set(STATISTICS)
    assert gap_closed(3.0, 2.0, 1.0) == 0.5


def test_a_file_goes_over_the_set_of_a_use() -> None:
    path = bars(md_drift=0.5, md_speedup=None, energy_mae=0.1)
    found = bars_for("md", path)
    assert found["md_drift"] == 0.5
    assert found["energy_mae"] == 0.1
    assert "md_speedup" not in found
    assert found["md_stable"] == USES["md"]["md_stable"]
    assert read_bars(path)["md_speedup"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("forces_mea: 0.1", "did you mean 'forces_mae'"),
        ("forces_mae: high", "must be a number"),
        ("forces_mae: true", "must be a number"),
        ("forces_mae: .nan", "must be a number"),
        ("forces_mae: .inf", "must be a number"),
        ("forces_mae: -0.1", "at least 0"),
        ("md_stable: 95", "at most 1"),
        ("forces_mae: [1]", "must be a number"),
        ("forces_mae: null", "leaves no bar"),
        ("- forces_mae", "holds no bars"),
        ("", "holds no bars"),
        ("{", "cannot be read"),
    ],
)
def test_bars_that_are_none(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yml").write_text(text)
    assert cli.main(["accept", "plain.pt", "--bars", "wrong.yml"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plain.pt"], "nothing to hold the student against"),
        (["plain.pt", "--bars", "missing.yml"], "missing.yml cannot be read"),
        (["missing.pt", "--for", "md"], "missing.pt"),
        (["plain.pt", "--for", "md", "--teacher", "missing.pt"], "missing.pt"),
        (["plain.pt", "--for", "md", "--split", "missing"], "missing"),
        (["plain.pt", "--for", "md", "--split", "a=data/test", "--split", "a=data/train"], "NAME="),
    ],
)
def test_wrong_arguments_end_in_a_sentence(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["accept", *argv, "--cpu"]) == 2
    assert words in capsys.readouterr().err


def test_a_bar_must_be_finite() -> None:
    with pytest.raises(UserError, match="must be a number"):
        bars_for(None, bars(forces_mae=str(np.nan)))


def test_the_page_has_every_figure_and_every_set() -> None:
    page = (ROOT / "docs" / "md.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name in FIGURES:
        assert any(f"`{name}`" in row for row in rows), name
    for use, limits in USES.items():
        (row,) = [row for row in rows if row.startswith(f"| `{use}` ")]
        found = dict(re.findall(r"`(\w+)` ([\d.]+)", row))
        assert {name: float(limit) for name, limit in found.items()} == limits
