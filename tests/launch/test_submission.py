"""What `--submit` asks of SLURM, and what its ranks make of what SLURM gives them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trainings import config, write_lmdb, write_yaml

from fairchem_kd.commands.fairchem import main
from fairchem_kd.errors import UserError
from fairchem_kd.launch.ranks import join_submitted_ranks
from fairchem_kd.launch.submission import sbatch_options


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Submits to an sbatch that takes everything; gives the script's options and commands."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "data/train", 2, seed=0)
    yml = write_yaml(tmp_path / "run.yml", config(tmp_path, tmp_path / "data"))
    before = yaml.safe_load(yml.read_text())
    before["optim"]["num_workers"] = 3

    def submit(*more: str, slurm: dict[str, Any] | None = None) -> tuple[dict[str, str], str]:
        yml.write_text(yaml.safe_dump({**before, "slurm": slurm or {}}))
        argv = ["--mode", "train", "--config-yml", "run.yml", "--submit", "--identifier", "mine"]
        assert main([*argv, *more]) == 0
        text = Path("logs/12/12_submission.sh").read_text()
        options = {}
        for line in text.splitlines():
            if line.startswith("#SBATCH --"):
                name, _, value = line.removeprefix("#SBATCH --").partition("=")
                assert name not in options, text  # SLURM would take the last one
                options[name] = value
        return options, text.partition("# command\n")[2]

    return submit


def test_two_nodes_of_eight_gpus(submitted: Any) -> None:
    options, commands = submitted(
        *("--num-nodes", "2", "--num-gpus", "8", "--slurm-partition", "gpu", "--slurm-timeout"),
        *("24", "--slurm-mem", "64", "--slurm-qos", "long", "--slurm-account", "chem"),
        slurm={"constraint": "h100", "exclude": "node[13-14]", "signal": "USR2@300"},
    )
    logs = Path("logs").absolute()
    assert options.pop("output") == f"{logs}/%j/%j_0_log.out"
    assert options.pop("error") == f"{logs}/%j/%j_0_log.err"
    assert options.pop("wckey") == "submitit"
    assert options == {
        "job-name": "mine",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "4",  # a rank and its three data loaders
        "mem": "64GB",
        "time": str(24 * 60),
        "partition": "gpu",
        "qos": "long",
        "account": "chem",
        "constraint": "h100",
        "exclude": "'node[13-14]'",
        "signal": "USR2@300",  # in place of USR2@90
        "open-mode": "append",  # a requeued job's log goes on
        "requeue": "",
    }
    srun = commands.splitlines()[1]
    assert srun.startswith("srun --unbuffered --output ")
    assert "%j_%t_log.err" in srun  # one for each rank
    assert " --cpus-per-task=4 --kill-on-bad-exit=1 " in srun


def test_the_slurm_block_goes_before_the_rest(submitted: Any) -> None:
    options, commands = submitted(
        *("--num-gpus", "4"),
        slurm={"cpus-per-task": 8, "gres": "gpu:a100:4", "requeue": False, "comment": None},
    )
    assert options["cpus-per-task"] == "8"
    assert "--cpus-per-task=8" in commands
    assert options["gres"] == "gpu:a100:4"
    assert "gpus-per-node" not in options
    assert "no-requeue" in options
    assert not {"requeue", "comment"} & options.keys()
    options, _ = submitted("--cpu", "--num-gpus", "4", slurm={"gres": "ssd:1", "mem": "1GB"})
    assert (options["ntasks-per-node"], options["mem"], options["gres"]) == ("4", "1GB", "ssd:1")
    assert "gpus-per-node" not in options
    assert sbatch_options(None) == {"requeue": True}


def rank(
    monkeypatch: pytest.MonkeyPatch, *, devices: int, cpu: bool = False, **slurm: int | str
) -> dict[str, Any]:
    """The third of four ranks, the second of its node's two; its config."""
    set_by_slurm = {
        "JOB_ID": 123456,
        "NTASKS": 4,
        "JOB_NUM_NODES": 2,
        "NODEID": 1,
        "JOB_NODELIST": "gpu[07-08]",
        "PROCID": 3,
        "LOCALID": 1,
        "CPUS_PER_TASK": 3,
    }
    for name, value in {**set_by_slurm, **slurm}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "before")  # and put back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    backend = "gloo" if cpu else "nccl"
    return join_submitted_ranks({"submit": True, "cpu": cpu, "distributed_backend": backend})


def met() -> list[str]:
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    return [os.environ[name] for name in names]


def test_ranks_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rank(monkeypatch, devices=2)
    assert made == {"submit": False, "cpu": False, "distributed_backend": "nccl", "world_size": 4}
    assert met() == ["gpu07", str(10000 + 123456 % 20000), "3", "1", "4"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # as SLURM has it
    rank(monkeypatch, devices=1)  # each task its own, as --gpus-per-task has it
    assert met()[3] == "0"
    with pytest.raises(
        UserError, match=r"rank 3 sees no GPU on .* \(CUDA_VISIBLE.* '0,1'\).*--cpu"
    ):
        rank(monkeypatch, devices=0)


def test_ranks_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    rank(monkeypatch, devices=0, cpu=True)
    assert met()[3] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert chosen == [3]
    rank(monkeypatch, devices=0, cpu=True, CPUS_PER_TASK="")  # as without SLURM
    assert chosen == [3, 4]  # a node's two ranks share what PyTorch would take
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own choice
    rank(monkeypatch, devices=0, cpu=True)
    assert chosen == [3, 4]
    rank(monkeypatch, devices=0, cpu=True, NTASKS=1, JOB_NUM_NODES=1, PROCID=0, LOCALID=0)
    assert met() == ["localhost", "0", "0", "0", "1"]
