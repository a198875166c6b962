"""The points of a sweep, their configs and their names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sweeps import BASE, E2N, write
from sweeps import place as place

from fairchem_kd.errors import UserError
from fairchem_kd.sweep.grid import sweep_grid
from fairchem_kd.sweep.manifest import expand, resolve, run_name
from fairchem_kd.sweep.spec import read_sweep


def test_grid_random_and_points_add_up(place):
    path = write(
        {
            "base": "base.yml",
            "seeds": [0, 3],
            "set": {"optim": {"max_epochs": 5}},
            "grid": {E2N: {"coefficient": ["1e-1", 2]}, "optim.lr_initial": [0.1]},
            "random": {"samples": 2, "keys": {f"{E2N}.coefficient": [7, 8]}},
            "points": {"plain": {E2N: None}, "as it is": {}},
        }
    )
    sweep = read_sweep(path)
    assert sweep.base == Path("base.yml")
    assert sweep.seeds == [0, 3]
    assert [p.label for p in sweep.points] == ["", "", "", "", "plain", "as it is"]
    assert all(p.values["optim.max_epochs"] == 5 for p in sweep.points)
    found = [p.values.get(f"{E2N}.coefficient") for p in sweep.points]
    assert found[:2] == [0.1, 2]  # text that YAML does not take for a number is one here
    assert set(found[2:4]) <= {7, 8}
    runs = resolve(sweep, BASE)
    assert len(runs) == len({run.name for run, _ in runs}) == 12
    plain = next(config for run, config in runs if run.label == "plain")
    assert plain["task"]["distillation"]["losses"]["e2n"] is None
    assert {run.seed for run, _ in runs} == {0, 3}
    assert all("seed" not in config for _, config in runs)  # the command line gives it


def test_a_stock_grid_is_read_as_fairchem_documents_it(place):
    path = write({"optim": {"lr_initial": [0.1, 0.2]}, "model.num_layers": [2, 3]})
    sweep = read_sweep(path)
    assert [p.values for p in sweep.points] == [
        {"optim.lr_initial": lr, "model.num_layers": n} for lr in (0.1, 0.2) for n in (2, 3)
    ]
    with pytest.raises(UserError, match=r"names no base config.*--config-yml"):
        expand(path)
    assert len(expand(path, config_yml=Path("base.yml")).runs) == 4


def test_fairchem_and_fairchem_kd_span_the_same_configs(place):
    path = write({"base": "lost.yml", "seeds": [1, 2], "grid": {f"{E2N}.coefficient": [3, 4]}})
    before = copy.deepcopy(BASE)
    grid = sweep_grid({**BASE, "identifier": "id", "seed": 0}, path)
    assert before == BASE
    assert [c["identifier"] for c in grid] == [f"id_run{n}" for n in range(4)]
    assert [c["seed"] for c in grid] == [1, 2, 1, 2]
    explicit = [config for _, config in resolve(read_sweep(path), BASE)]
    keys = BASE.keys()
    assert [{k: c[k] for k in keys} for c in grid] == [{k: c[k] for k in keys} for c in explicit]


def test_random_search_is_reproducible_and_grows(place):
    keys = {
        "optim.lr_initial": {"distribution": "loguniform", "low": 1e-4, "high": 1e-1},
        "optim.max_epochs": {"distribution": "integer", "low": 2, "high": 4},
        f"{E2N}.coefficient": {"distribution": "uniform", "low": 5, "high": 6},
    }

    def points(samples: int, sampler: str = "random", seed: int = 0, **more: Any) -> list[Any]:
        block = {"samples": samples, "sampler": sampler, "seed": seed, "keys": keys | more}
        return [p.values for p in read_sweep(write({"random": block})).points]

    for sampler in ("random", "sobol"):
        found = points(256, sampler)
        assert found == points(256, sampler)
        assert found != points(256, sampler, seed=1)
        assert points(16, sampler) == found[:16]  # more samples add to those that there are
        rates = np.log10([p["optim.lr_initial"] for p in found])
        assert -4 <= rates.min() < -3.8 < -1.2 < rates.max() <= -1
        assert np.mean(rates < -2.5) == pytest.approx(0.5, abs=0.1)
        assert {p["optim.max_epochs"] for p in found} == {2, 3, 4}
        assert all(5 <= p[f"{E2N}.coefficient"] <= 6 for p in found)
    wider = points(16, **{"optim.batch_size": [1, 2]})
    assert [{k: p[k] for k in keys} for p in wider] == points(16)


def test_a_name_is_the_configs_own(place):
    one = {"a": {"b": 1, "c": [1.0, "x"]}, "slurm": {"partition": "gpu"}}
    assert run_name(one, []) == run_name({"a": {"c": [1, "x"], "b": 1.0}}, [])
    assert len(run_name(one, [])) == 10
    different = ({"a": {"b": 2, "c": [1, "x"]}}, {"a": {"b": True, "c": [1, "x"]}}, {"a": {"b": 1}})
    assert len({run_name(config, []) for config in (one, *different)}) == 4
    assert run_name(one, ["--seed", "0"]) != run_name(one, ["--seed", "1"])
    # for ever: a sweep finds its finished runs by these
    assert run_name(one, ["--seed", "0"]) == "fde2202b8c"


def test_shipped_sweeps_expand(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    paths = sorted(Path("yaml_configs/sweeps").glob("*.yml"))
    assert len(paths) >= 9
    for path in paths:
        runs = expand(path, write=False).runs
        assert runs
        if "kd/pure/" in yaml.safe_load(path.read_text())["base"]:
            assert len(runs) % 8 == 0, path  # for nodes of 8 GPUs
