"""The commands, mostly as a user runs them: in processes of their own."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import models
import pytest
import yaml
from commands import Command, run_to_end
from trainings import write_lmdb

from fairchem_kd.commands import configs, data, data_convert, doctor, fairchem
from fairchem_kd.commands import main as cli
from fairchem_kd.errors import UserError
from fairchem_kd.stock.plugin import check_fairchem_core
from fairchem_kd.sweep.grid import sweep_grid


def run(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fairchem_kd``, the `fairchem` command, on a machine without a GPU."""
    command = [sys.executable, "-m", "fairchem_kd", *argv]
    return run_to_end(command, cwd, **{"CUDA_VISIBLE_DEVICES": "", **env})


PROBE = """
import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem_kd.errors import UserError


def flushed(_=None):
    return (torch.tensor([1e-40]) * torch.tensor([0.5])).item() == 0


class Probe:
    def __init__(self, **config):
        registry.get_trainer_class("distillation")
        text = f"rank {distutils.get_rank()} of {distutils.get_world_size()}, flushed: {flushed()}"
        if distutils.get_world_size() == 1:  # fairchem gives several ranks no workers
            loader = torch.utils.data.DataLoader([0], num_workers=1, collate_fn=flushed)
            text += f", in workers: {next(iter(loader))}"
        raise UserError(text + ".")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stock config for SchNet and two small data sets."""
    folder = tmp_path_factory.mktemp("workplace")
    write_lmdb(folder / "data/train", 4, seed=0)
    write_lmdb(folder / "data/val", 2, seed=0)
    free_atoms = {"train_on_free_atoms": True, "eval_on_free_atoms": True}
    config = {
        "trainer": "ocp",
        "model": models.model_config("schnet"),
        "dataset": {
            "train": {"format": "lmdb", "src": "data/train"},
            "val": {"format": "lmdb", "src": "data/val"},
        },
        "outputs": {"energy": {"level": "system"}, "forces": {"level": "atom", **free_atoms}},
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 1}},
            {"forces": {"fn": "l2mae", "coefficient": 10}},
        ],
        "evaluation_metrics": {
            "metrics": {"energy": ["mae"], "forces": ["mae"]},
            "primary_metric": "forces_mae",
        },
        "optim": {
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "lr_initial": 0.001,
            "max_epochs": 1,
            "scheduler": "Null",
        },
        "logger": "tensorboard",
    }
    (folder / "schnet.yml").write_text(yaml.safe_dump(config))
    # a trainer of the user's own, which tells in which processes denormals are flushed
    (folder / "probe.py").write_text(PROBE)
    (folder / "probe.yml").write_text(yaml.safe_dump({**config, "trainer": "probe.Probe"}))
    return folder


@pytest.mark.slow
def test_a_stock_config_trains_without_cpu_flag_or_gpu(workplace):
    done = run(
        "main",
        "--mode",
        "train",
        "--config-yml",
        "schnet.yml",
        "--identifier",
        "a",
        "--optim.max_epochs=2",
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No CUDA device here: running on the CPU") == 1
    assert "Total time taken" in done.stdout
    [checkpoint] = workplace.glob("checkpoints/*-a/checkpoint.pt")
    assert checkpoint.stat().st_size > 1000


@pytest.mark.slow
def test_ranks_say_one_sentence_and_flush_denormals_everywhere(workplace):
    done = run(
        "--mode",
        "train",
        "--config-yml",
        "probe.yml",
        "--num-gpus",
        "2",
        "--flush-denormal",
        cwd=workplace,
        PYTHONPATH=str(workplace),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    # torch itself has a line about the launch before it
    assert done.stderr.splitlines()[-1] in [f"error: rank {r} of 2, flushed: True." for r in (0, 1)]
    assert "exitcode" not in done.stderr


@pytest.mark.slow
def test_a_sweep_runs_its_grid_in_fresh_processes(workplace):
    grid = {"trainer": ["probe.Probe", "ocp"], "optim": {"lr_initial": ["1e-4"]}}
    (workplace / "sweep.yml").write_text(yaml.safe_dump(grid))
    argv = ["--mode", "train", "--config-yml", "schnet.yml", "--sweep-yml", "sweep.yml"]
    argv += ["--identifier", "s", "--flush-denormal"]
    log = workplace / "sweep.log"
    assert Command(argv, workplace, log, PYTHONPATH=str(workplace)).wait() == 2
    said = log.read_text()
    assert "error: rank 0 of 1, flushed: True, in workers: True." in said
    assert "1 of 2 runs failed: [('s_run0', 2)]" in said
    assert "Traceback" not in said
    assert list(workplace.glob("checkpoints/*-s_run1/checkpoint.pt"))


def test_help_is_stocks_and_ours(capsys):
    with pytest.raises(SystemExit) as stopped:
        fairchem.main(["main", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for flag in ("usage: fairchem ", "--config-yml", "--sweep-yml", "--flush-denormal"):
        assert flag in said


@pytest.fixture
def launch(monkeypatch, workplace):
    """The `fairchem` command in this process, for what ends before it launches anything."""
    monkeypatch.chdir(workplace)
    from fairchem_kd.commands.fairchem import main

    return main


def test_a_wrong_config_is_a_sentence(launch, workplace, capsys):
    def stderr_of(*argv):
        assert launch(["main", "--mode", "train", *argv]) == 2
        return capsys.readouterr().err

    said = stderr_of("--config-yml", "shcnet.yml")
    assert "shcnet.yml, given with --config-yml, does not exist" in said
    assert "did you mean 'schnet.yml'?" in said
    Path("twice.yml").write_text("model: 1\nmodel: 2\n")
    assert "twice.yml cannot be used" in stderr_of("--config-yml", "twice.yml")
    Path("lost.yml").write_text("includes: [nowhere.yml]\n")
    said = stderr_of("--config-yml", "lost.yml")
    assert "lost.yml includes nowhere.yml, which is neither in the current directory" in said
    assert f"{Path.cwd()}, nor beside it" in said
    Path("slip.yml").write_text("include: [schnet.yml]\n")
    said = stderr_of("--config-yml", "slip.yml")
    assert "nobody reads its 'include' (did you mean 'includes'?)" in said
    assert "is a folder: name a YAML file in it" in stderr_of("--config-yml", ".")
    said = stderr_of("--config-yml", "schnet.yml", "--dataset.val.src=data/vla")
    assert "dataset.val.src" in said
    assert "does not exist" in said
    said = stderr_of("--config-yml", "schnet.yml", "--dataset.val.build.recipe=slbs")
    assert "dataset.val.build" in said
    assert "slabs" in said
    said = stderr_of("--config-yml", "schnet.yml", "--sweep-yml", "no.yml")
    assert "no.yml, given with --sweep-yml, does not exist" in said
    with pytest.raises(SystemExit) as stopped:
        launch(["--mode", "trian", "--config-yml", "schnet.yml"])
    assert stopped.value.code == 2


def test_stock_command_is_put_back_and_its_runner_pickles():
    from fairchem.core import _cli

    from fairchem_kd.launch.ranks import KDRunner, run_launched_rank
    from fairchem_kd.launch.stock_command import stock_command_with
    from fairchem_kd.launch.submission import Executor

    names = ("build_config", "create_grid", "Runner", "runner_wrapper", "AutoExecutor")
    before = [getattr(_cli, name) for name in names]
    replaced = {"config": {"a": 1}, "grid": None, "runner": KDRunner, "rank": run_launched_rank}
    with stock_command_with(**replaced, executor=Executor):
        assert _cli.build_config(None, []) == {"a": 1}
        assert type(pickle.loads(pickle.dumps(_cli.Runner()))) is KDRunner
        assert pickle.loads(pickle.dumps(_cli.runner_wrapper)) is run_launched_rank
    assert [getattr(_cli, name) for name in names] == before


def test_grid_of_a_sweep(tmp_path):
    file = tmp_path / "sweep.yml"
    file.write_text("optim: {lr_initial: [1e-4, 0.01]}\nmodel.layers: [1, 2]\ntask: {x: [null]}\n")
    base = {"identifier": "id", "optim": {"lr_initial": 1.0, "batch_size": 2}}
    before = copy.deepcopy(base)
    grid = sweep_grid(base, file)
    assert base == before
    assert [c["identifier"] for c in grid] == [f"id_run{i}" for i in range(4)]
    assert [(c["optim"]["lr_initial"], c["model"]["layers"]) for c in grid] == [
        (1e-4, 1),
        (1e-4, 2),
        (0.01, 1),
        (0.01, 2),
    ]
    assert all(c["task"] == {"x": None} and c["optim"]["batch_size"] == 2 for c in grid)
    for text, wrong in (
        ("optim: {lr_initial: 3}", "optim.lr_initial"),
        ("", "the file"),
        ("a: []", "a must"),
        ("a: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=wrong):
            sweep_grid(base, file)


def test_dispatcher(capsys):
    for argv, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == code
    said = capsys.readouterr()
    assert all(name in said.out for name in cli.COMMANDS)
    assert "nonsense" in said.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_subcommand_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"fairchem-kd {command}" in capsys.readouterr().out


#: Every command and subcommand asked for help, and given what it does not know.
PARSED = """
import argparse, contextlib, importlib, io, json, sys
from fairchem_kd.commands.arguments import Parser
from fairchem_kd.commands.main import COMMANDS, main

def below(parser, words):
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, made in action.choices.items():
                yield from below(made, [*words, name])

cases = [["--help"], ["--version"], [], ["nonsense"], *json.loads(sys.argv[1])]
for name, command in COMMANDS.items():
    parser = Parser()
    importlib.import_module(command.module).add_arguments(parser)
    for words in below(parser, [name]):
        cases += [[*words, "--help"], [*words, "--nonsense"]]
for argv in cases:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(argv)
        except SystemExit as stopped:
            code = stopped.code
    heavy = {"torch", "numpy", "ase", "fairchem", "fairchem.core"} & {*sys.modules}
    print(json.dumps([argv, code, sorted(heavy)]))
"""
USAGE_ERRORS = [
    ["export"],
    ["export", "best_checkpoint.pt"],
    ["init", "--student", "config.yml"],
    ["compare", "run", "--atoms", "some"],
    ["cka", "--student", "run", "--samples", "-1"],
    ["data", "slabs", "--train", "3"],
    ["data", "convert", "SOURCE"],
    ["data", "convert", "SOURCE", "DEST", "--energy-unit", "J"],
    ["sweep", "run", "sweep.yml", "--workers", "0"],
]


def test_help_and_usage_errors_import_nothing_heavy():
    done = run_to_end([sys.executable, "-c", PARSED, json.dumps(USAGE_ERRORS)])
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    asked = [" ".join(argv) for argv, _, _ in found]
    for words in (*cli.COMMANDS, "data convert", "data slabs", "sweep run", "sweep collect"):
        assert f"{words} --help" in asked
    for argv, code, heavy in found:
        assert code == (0 if argv[-1:] in (["--help"], ["--version"]) else 2), argv
        assert not heavy, f"{argv} imported {heavy}"


def test_what_is_said_of_the_data_without_importing_it_is_so():
    from fairchem_kd.data.convert import labels
    from fairchem_kd.data.recipes.registry import RECIPES, least_sizes

    assert {name: dict(recipe.sizes) for name, recipe in RECIPES.items()} == data.SIZES
    for name, recipe in RECIPES.items():
        least = dict.fromkeys(recipe.sizes, 1) | {"train": data.LEAST_TRAIN[name]}
        assert least_sizes(recipe) == least
    assert tuple(labels.ENERGY_UNITS) == data_convert.ENERGY_UNITS
    assert tuple(labels.LENGTH_UNITS) == data_convert.LENGTH_UNITS


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["configs"],
        ["sweep", "run", "--help"],
        pytest.param(["inspect", "schnet.yml"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_is_no_error(argv, workplace):
    code = "import sys; from fairchem_kd.commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *argv]
    if argv[0] != "inspect":  # which takes long to start; what follows is the stricter
        piped = f"{shlex.join(command)} | head -1; echo ${{PIPESTATUS[0]}}"
        done = run_to_end(["bash", "-c", piped], workplace)
        line, status = done.stdout.splitlines()
        assert line
        assert (done.stderr, status in ("0", "141")) == ("", True)  # 0: all was written in time

    reader, writer = os.pipe()
    os.close(reader)  # before the command starts, so that it is never in time
    with os.fdopen(writer) as out:
        gone = subprocess.run(
            command,
            cwd=workplace,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # else argparse itself drops the error
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (gone.stderr, gone.returncode) == ("", 141)


def test_another_broken_pipe_is_not_taken_for_the_readers(monkeypatch):
    def broken(args):
        raise BrokenPipeError

    monkeypatch.setattr(configs, "run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["configs"])


def test_a_command_is_given_up_when_it_is_silent_rather_than_slow():
    with pytest.raises(AssertionError, match="no sign of life in 2 s"):
        run_to_end([sys.executable, "-c", "import time; time.sleep(600)"], silence_s=2)
    busy = "import time\nwhile time.process_time() < 4: pass\nprint('done')"
    assert run_to_end([sys.executable, "-c", busy], silence_s=2).stdout == "done\n"


def test_configs_are_copied(tmp_path, capsys):
    assert cli.main(["configs"]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert "yaml_configs/kd/e2n.yml" in names
    assert cli.main(["configs", "--copy", str(tmp_path)]) == 0
    assert all((tmp_path / name).is_file() for name in names)
    assert configs.copy_configs(tmp_path) == []  # all there
    changed = tmp_path / names[0]
    changed.write_text("mine")
    assert cli.main(["configs", "--copy", str(tmp_path)]) == 2
    assert f"{changed} exists and differs" in capsys.readouterr().err
    assert changed.read_text() == "mine"
    assert configs.copy_configs(tmp_path, force=True) == [changed]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        configs.copy_configs(tmp_path / "file")


@pytest.mark.parametrize(("installed", "said"), [("2.3.0", "2.x has other"), ("1.9.1", "older")])
def test_another_fairchem_core_is_refused(installed, said, monkeypatch, capsys):
    monkeypatch.setattr("fairchem_kd.stock.plugin.version", lambda name: installed)
    with pytest.raises(UserError, match=f"{installed} is installed .*{said}"):
        check_fairchem_core()
    assert fairchem.main(["--help"]) == 2
    assert cli.main(["inspect", "x"]) == 2
    assert "fairchem-core>=1.10,<2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:  # help needs none
        cli.main(["inspect", "--help"])
    assert stopped.value.code == 0


def test_doctor_finds_this_environment_in_order(capsys, monkeypatch, tmp_path):
    # a script of ours in front, whatever shell the tests were started from
    monkeypatch.setattr(doctor, "scripts_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fairchem").write_text("#!/bin/sh\nfrom fairchem.core._cli import main\n")
    (tmp_path / "fairchem").chmod(0o755)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "no leading `main`" in said
    assert "1 problem found" in said
    assert cli.main(["doctor", "--fix"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "everything is in order" in said
    for name in ("torch", "fairchem-core", "torch_scatter", "torch_sparse", "gloo"):
        assert name in said
    assert doctor.fix_script() is None
    done = subprocess.run(
        ["fairchem"], capture_output=True, text=True, check=False, env=os.environ.copy()
    )
    assert done.returncode == 2
    assert "--config-yml" in done.stderr


def test_doctor_needs_nothing_to_run(monkeypatch, capsys):
    """What is missing is a finding, not a crash."""

    def missing(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr("fairchem_kd.stock.plugin.version", missing)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert said.count("PROBLEM: missing") == len(doctor.REQUIRED) + 2
    assert "pip install ./compat" in said
    assert fairchem.main([]) == 2
    assert "which is missing" in capsys.readouterr().err


def test_fix_survives_a_long_or_spaced_path(monkeypatch, tmp_path):
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    python = folder / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    script = doctor.fix_script(folder)
    assert os.access(script, os.X_OK)
    script.write_text(script.read_text().replace("sys.exit(main())", "print(sys.argv[1])"))
    path = json.dumps([str(p) for p in sys.path if p])
    body = script.read_text().replace("import sys\n", f"import sys\nsys.path += {path}\n", 1)
    script.write_text(body)
    done = subprocess.run([script, "x y"], capture_output=True, text=True, check=False)
    assert done.stdout == "x y\n", done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
@pytest.mark.parametrize("argv", [["fairchem-kd", "data", "convert", "--help"]])
def test_a_terminal_without_our_letters_shows_others(argv: list[str], encoding: str) -> None:
    code = f"import sys; from fairchem_kd.commands.main import main; sys.exit(main({argv[1:]}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert b"--force-unit" in done.stdout
