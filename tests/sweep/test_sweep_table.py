"""The table of a sweep: means over seeds, their intervals, its columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sweeps import E2N, said, write
from sweeps import place as place

from fairchem_kd.commands.main import main
from fairchem_kd.stock.trainer import with_primary_metric
from fairchem_kd.sweep.collect import collect, estimate, run_metrics
from fairchem_kd.sweep.columns import short_keys
from fairchem_kd.sweep.manifest import expand, read_manifest
from fairchem_kd.sweep.state import statuses, write_state
from fairchem_kd.training.records import Records


def test_mean_and_interval_against_the_textbook():
    values = [4.1, 3.7, 4.6]
    found = estimate(values)
    mean = sum(values) / 3
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.half == pytest.approx(4.302652729911275 * s / math.sqrt(3), rel=1e-9)  # t, 2 d.f.
    assert estimate([4.1, 3.7]).half == pytest.approx(12.706204736432095 * 0.2, rel=1e-9)
    assert estimate([2.0]).half is None
    # covers the true mean in 95 of 100 cases
    rng = np.random.default_rng(0)
    draws = [estimate(list(row)) for row in rng.normal(1.0, 2.0, (1000, 4))]
    covered = np.mean([abs(e.mean - 1.0) < (e.half or 0) for e in draws])
    assert covered == pytest.approx(0.95, abs=0.03)


@pytest.fixture
def finished(place) -> Callable[[dict[str, Any]], Path]:
    """Expands a sweep whose runs are done; energy_mae is coefficient + seed / 10 at its best."""

    def make(contents: dict[str, Any]) -> Path:
        path = write({"base": "base.yml", **contents})
        manifest = expand(path)
        for run in manifest.runs:
            best = float(run.values.get(f"{E2N}.coefficient", 7)) + run.seed / 10
            records = Records(manifest.run_folder(run))
            records.write("train", step=1, epoch=0.5, metrics={"energy_mae": 0.0})
            for step, value in ((2, 9999.0), (2, best + 1), (4, best), (6, best + 2)):
                metrics = {"energy_mae": value, "forces_mae": step}
                records.write("val", step=step, epoch=step / 4, metrics=metrics)
            write_state(manifest, run, "done")
        return path

    return make


def test_collect(finished, capsys):
    path = finished({"seeds": [0, 1, 2], "grid": {f"{E2N}.coefficient": [1, 10, 100]}})
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    assert run_metrics(manifest, manifest.runs[1]) == {"energy_mae": 1.1, "forces_mae": 4.0}
    assert run_metrics(manifest, manifest.runs[1], "last")["energy_mae"] == pytest.approx(3.1)
    write_state(manifest, manifest.runs[0], "failed", reason="x")
    assert main(["sweep", "collect", str(path), "--metrics", "energy_mae"]) == 0
    out = capsys.readouterr().out
    half = 12.706204736432095 * 0.05  # of 1.1 and 1.2
    assert f"| 1 | 2 of 3 | 1.15 ± {half:.2g} |" in out
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert f"| 10 | 3 | 10.1 ± {half:.2g} |" in out
    head, *lines = (manifest.folder / "results.csv").read_text().splitlines()
    assert head.startswith("e2n.coefficient,seeds,done,energy_mae_mean,energy_mae_ci95")
    assert lines[0].startswith("1,3,2,1.15")
    assert len(lines) == 3
    assert (manifest.folder / "results.md").read_text() in out
    assert (manifest.folder / "results.png").stat().st_size > 5000
    assert main(["sweep", "collect", str(path), "--partial", "--no-plot"]) == 0
    assert "of 3" not in capsys.readouterr().out
    sentence = said(capsys, "collect", str(path), "--metrics", "force_mae")
    assert "did you mean 'forces_mae'" in sentence


def test_the_best_is_by_the_metric_that_the_trainer_chose(place):
    """Where the config names none."""
    base = yaml.safe_load(Path("base.yml").read_text())
    del base["evaluation_metrics"]
    Path("base.yml").write_text(yaml.safe_dump(base))
    manifest = expand(write({"base": "base.yml", "seeds": [0]}))
    [run] = manifest.runs
    records = Records(manifest.run_folder(run))
    metrics = with_primary_metric(None, ("energy", "forces"))
    records.write("config", step=0, config={"evaluation_metrics": metrics})
    for step, energy, forces in ((2, 1.0, 9.0), (4, 2.0, 3.0), (6, 3.0, 5.0)):
        found = {"energy_mae": energy, "forces_mae": forces}
        records.write("val", step=step, epoch=step / 4, metrics=found)
    assert run_metrics(manifest, run) == {"energy_mae": 2.0, "forces_mae": 3.0}


def test_collect_of_named_points_and_of_nothing(finished, place, capsys):
    path = finished({"points": {"e2n": {}, "plain | x": {E2N: None}}, "seeds": [0, 1]})
    assert main(["sweep", "collect", str(path), "--at", "last"]) == 0
    out = capsys.readouterr().out
    assert "| point | seeds | energy_mae | forces_mae |" in out
    assert "| plain \\| x | 2 | 9.05 ±" in out
    manifest = read_manifest(Path("runs/sweeps/sweep"))
    for run in manifest.runs:
        write_state(manifest, run, "failed", reason="x")
    assert "no run of this sweep has metrics yet" in said(capsys, "collect", str(path))
    rows = collect(manifest, statuses(manifest))
    assert [row.done for row in rows] == [0, 0]


def test_short_keys():
    keys = ["optim.lr_initial", f"{E2N}.coefficient", f"{E2N[:-3]}n2n.coefficient", "amp"]
    assert list(short_keys(keys).values()) == [
        "optim.lr_initial",
        "e2n.coefficient",
        "n2n.coefficient",
        "amp",
    ]
    assert short_keys(["a.x.y", "b.x.y"]) == {"a.x.y": "a.x.y", "b.x.y": "b.x.y"}
