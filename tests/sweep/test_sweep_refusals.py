"""Sweeps that are refused, by either command, in a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sweeps import E2N, said, write
from sweeps import place as place

from fairchem_kd.commands.fairchem import main as fairchem


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("", "empty sweep"),
        ({"base": "base.yml"}, "is an empty sweep"),
        ({"base": "base.yml", "grid": {}, "seeds": [1]}, "is an empty sweep"),
        ({"base": "base.yml", "seeds": []}, "empty"),
        ({"base": "base.yml", "seeds": [1, 1]}, "twice"),
        ({"base": "base.yml", "seeds": 3}, "seeds must be a list"),
        ({"base": "bsae.yml", "seeds": [1]}, "base config bsae.yml does not exist .*'base.yml'"),
        ({"base": "base.yml", "gird": {"a": [1]}}, "unknown key 'gird' .did you mean 'grid'"),
        ({"grids": {"a": [1]}}, "unknown key 'grids' .did you mean 'grid'"),
        ({"base": "base.yml", "grid": {"optim.max_epochs": 3}}, "must hold a list"),
        ({"base": "base.yml", "grid": {"optim.max_epochs": [3, 3.0]}}, "are the same run .hash"),
        ({"base": "base.yml", "points": [{}, {}]}, "are the same run"),
        (
            {"base": "base.yml", "grid": {f"optim.k{i}": list(range(60)) for i in range(4)}},
            "spans 12,960,000 points, and a sweep has 100,000 at most",
        ),
        (
            {"base": "base.yml", "random": {"samples": 1e8, "keys": {"optim.lr_initial": [1]}}},
            "samples must be at most 100000",
        ),
        ({"base": "base.yml", "points": 3}, "points must be a list"),
        ({"base": "base.yml", "points": [3]}, r"points\[0\] must be a mapping"),
        ({"base": "base.yml", "grid": {"run_dir": ["x"]}}, "run_dir is set by the command"),
        ({"base": "base.yml", "seeds": [1], "grid": {"seed": [1]}}, "give one of them"),
        ({"base": "base.yml", "sampler": "tpe"}, "stands in the block random"),
        (
            {"base": "base.yml", "grid": {"optim": {"max_epochs": [1]}, "optim.max_epochs": [2]}},
            "set the same place",
        ),
        (
            {"random": {"samples": 1, "sampler": "sobbol", "keys": {"a": [1]}}},
            "random.sampler cannot be 'sobbol' .did you mean 'sobol'",
        ),
        ({"random": {"samples": 0, "keys": {"a": [1]}}}, "samples must be at least 1"),
        ({"random": {"samples": 1, "keys": {}}}, "random.keys is empty"),
        ({"random": {"samples": 1, "keys": {"a": 3}}}, "random.keys: a must be a list or"),
        (
            {"random": {"samples": 1, "keys": {"a": {"distribution": "gauss"}}}},
            "distribution cannot be 'gauss'; known: choice, integer, loguniform, uniform",
        ),
        (
            {"random": {"samples": 1, "keys": {"a": {"distribution": "uniform", "low": 1}}}},
            "high is required",
        ),
        (
            {
                "random": {
                    "samples": 1,
                    "keys": {"a": {"distribution": "uniform", "low": 2, "high": 1}},
                }
            },
            "low must be less than high",
        ),
        (
            {
                "random": {
                    "samples": 1,
                    "keys": {"a": {"distribution": "loguniform", "low": 0, "high": 1}},
                }
            },
            "low must be greater than 0",
        ),
        ("grid: {a: [1], a: [2]}", "not valid YAML"),
    ],
)
def test_bad_sweeps_are_a_sentence(place, capsys, contents, words):
    sentence = said(capsys, "expand", str(write(contents)))
    assert re.search(words, sentence), sentence
    assert "sweep.yml" in sentence
    assert not Path("runs").exists()


def test_the_fairchem_command_refuses_the_same(place, capsys):
    argv = ["main", "--mode", "train", "--config-yml", "base.yml", "--sweep-yml"]
    for contents, words in (
        ({"optm": {"lr_initial": [1, 2]}}, "did you mean 'optim'"),
        ({"base": "base.yml", "grid": {f"{E2N}.coeficient": [1]}}, "did you mean 'coefficient'"),
        ({"grid": {}}, "is an empty sweep"),
    ):
        assert fairchem([*argv, str(write(contents))]) == 2
        assert f"error: sweep.yml{'' if 'empty' in words else ':'} " in (
            error := capsys.readouterr().err
        )
        assert words in error


def test_missing_files_are_a_sentence(place, capsys):
    assert "nowhere.yml does not exist" in said(capsys, "expand", "nowhere.yml")
    assert "has no manifest.json" in said(capsys, "status", str(place))
    assert "has no manifest.json" in said(capsys, "collect", str(write({"seeds": [1]})))
