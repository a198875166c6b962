"""``fairchem-kd cost``: clocks, memory, a step with and without distillation, what is written."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Command
from trainings import config, inside, trainer, write_home, write_yaml

from fairchem_kd.analysis.cost import timing
from fairchem_kd.analysis.cost.timing import Stopwatch, Timing, peak_memory, ratio, take_turns
from fairchem_kd.analysis.cost.training import _arguments, _Stepping, measure_training
from fairchem_kd.analysis.subjects.runs import ModelFile, read_model
from fairchem_kd.commands import main as cli
from fairchem_kd.models.file import read_checkpoint

CPU = torch.device("cpu")
LOSSES = {"e2n": {}, "v2v": {}, "vanilla": {}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data, a teacher, a distilled student that was trained, a plain one."""
    root = tmp_path_factory.mktemp("home")
    with inside(root):
        write_home({"train": 12, "val": 4, "test": 5})
        run = config(
            Path("."), Path("data"), losses=LOSSES, teacher=Path("teacher.pt"), max_epochs=1
        )
        write_yaml(Path("run.yml"), run)
        Command(
            ["main", "--mode", "train", "--config-yml", "run.yml", "--cpu"], root, root / "log.txt"
        ).finish()
        [trained] = Path("checkpoints").glob("*/best_checkpoint.pt")
        trained.rename("distilled.pt")
        with trainer(config(Path("."), Path("data")), identifier="plain") as built:
            path = built.save(checkpoint_file="plain.pt", training_state=False)
        Path(path).rename("plain.pt")
    return root


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(home)
    yield
    torch.set_flush_denormal(False)


def test_inner_sections_do_not_count_for_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def take(seconds: float) -> int:
        now[0] += seconds
        return 7

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch(CPU)
    inner = watch.timed(lambda: f"{watch.running} inner", lambda: take(5.0))
    with watch.section("outer"):
        take(2.0)
        assert inner() == 7
        take(1.0)
        inner()
    assert watch.seconds == {"outer": 3.0, "outer inner": 10.0}


def test_turns_are_taken_by_each_way_and_begun_by_every_one() -> None:
    order: list[str] = []
    ways = [lambda name=name: order.append(name) for name in "abc"]
    timings = take_turns(ways, CPU, repeats=2, warm_up=1)  # type: ignore[arg-type]
    assert "".join(order) == "abcbcacab"
    assert [len(timing.seconds) for timing in timings] == [2, 2, 2]


def test_medians_quartiles_and_ratios() -> None:
    timing = Timing([1.0, 5.0, 2.0, 4.0, 3.0])
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    # turn by turn: a machine that was twice as slow for one of them does not count
    assert ratio(Timing([2.0, 4.0, 2.0]), Timing([1.0, 2.0, 1.0])).seconds == [2.0] * 3


def test_peak_memory_is_what_is_there_at_once() -> None:
    size = 250_000  # floats: 1 MB

    def two_at_once() -> None:
        for _ in range(3):
            one = torch.zeros(size)
            other = torch.zeros(size)
            del one, other

    assert peak_memory(two_at_once, CPU) == pytest.approx(2e6, rel=0.01)
    held: list[torch.Tensor] = []
    assert peak_memory(lambda: held.append(torch.zeros(3 * size)), CPU) == pytest.approx(
        3e6, rel=0.01
    )


def test_peak_memory_hides_the_profilers_lines_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """They are written past Python; what the work itself has to say is not lost."""
    peak_memory(lambda: os.write(2, b"from below\n"), CPU)
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "from below\nstill here\n"
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 // 0, CPU)
    os.write(2, b"and here\n")
    assert capfd.readouterr().err == "and here\n"


def test_a_step_has_its_parts_with_and_without_distillation(home: Path) -> None:
    # as every run that the command trains is saved: in DDP's wrapper
    assert all(key.startswith("module.") for key in read_checkpoint("distilled.pt")["state_dict"])
    state = torch.get_rng_state()
    cost = measure_training(read_model("distilled.pt"), cpu=True, repeats=3, warm_up=1)
    assert torch.equal(state, torch.get_rng_state())
    assert (cost.batch_size, cost.companions, cost.steps_per_epoch) == (3, 0, 4)
    assert 36 < cost.atoms < 44
    common = {"student forward", "label losses", "metrics", "backward", "optimiser", "EMA"}
    assert set(cost.anatomy["plain"]) == common
    assert set(cost.anatomy["distilled"]) == common | {
        "teacher forward",
        "teacher taps",
        "student taps",
        "units and sums of the terms",
        "loss e2n",
        "loss v2v",
        "loss vanilla",
        "projections' optimiser",
    }
    for way, whole in (("plain", cost.plain), ("distilled", cost.distilled)):
        parts = cost.anatomy[way]
        assert all(len(timing.seconds) == 3 for timing in [whole, *parts.values()])
        # other turns than those that are timed whole, but the same work
        assert 0.3 < sum(t.median for t in parts.values()) / whole.median < 3
        assert cost.peak_memory[way] > 0
        assert cost.epoch(way) == pytest.approx(4 * (whole.median + cost.data.median))
    assert cost.overhead.median > 1.1  # a GemNet-OC beside a small PaiNN
    assert cost.peak_memory["distilled"] > 0.5 * cost.peak_memory["plain"]


def test_companions_are_a_part_and_all_data_are_closed(home: Path) -> None:
    file = read_model("distilled.pt")
    task = copy.deepcopy(file.config["task"])
    task["distillation"]["rattle"] = {"copies": 0.5, "std": 0.05}
    task["distillation"]["unlabelled"] = {"dataset": {"format": "lmdb", "src": "data/val"}}
    more = ModelFile(file.path, {**file.config, "task": task})
    for _ in range(2):  # LMDB opens a file once in a process
        cost = measure_training(more, cpu=True, repeats=1, warm_up=0)
        assert cost.companions > 3  # as many unlabelled ones as labelled, and copies
        assert "companions" in cost.anatomy["distilled"]
        assert "companions" not in cost.anatomy["plain"]


def test_steps_are_those_of_the_trainer(home: Path) -> None:
    """The loop that is timed changes weights as the trainer's own does."""
    run = config(Path("."), Path("data"), losses=LOSSES, teacher=Path("teacher.pt"), max_epochs=1)
    arguments = _arguments(read_model("distilled.pt"), True, None)
    assert arguments["optimizer"] == {**run["optimizer"], "num_workers": 0}
    found = []
    for way in ("whole", "watched"):
        with trainer({**run, "is_debug": True}, _Stepping) as built:
            built.set_up()
            batch = next(built.batches())
            built.one_step(batch) if way == "whole" else built.watched_step(batch)
            found.append([p.detach().clone() for p in built.model.parameters()])
    with trainer({**run, "is_debug": True}) as built:
        built.set_up()
        built.train_sampler.set_epoch_and_start_iteration(0, 0)
        batch = next(iter(built.train_loader))
        built.step = 1
        built.model.train()
        built._backward(built._compute_loss(built._forward(batch), batch))
        expected = [p.detach().clone() for p in built.model.parameters()]
    for weights in found:
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_the_command(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["cost", "distilled.pt", "plain.pt", "--cpu", "--repeats", "3", "--warm-up", "1"]
    assert cli.main([*argv, "--batch-sizes", "1,4,100", "--out", "out"]) == 0
    text, said = capfd.readouterr()
    told = r"(distilled\.pt names its own data: opening data/\w+\n)+"
    # bars aside, which are for a terminal, nothing but what was written
    assert re.fullmatch(told + r"wrote out/cost.md, .*cost_training.svg\n", said), said
    for title in ("Inference", "A step of training", "Where the time goes (distilled)"):
        assert f"{title}\n" in text
    assert "1 thread(s), denormals flushed to zero" in text
    results = json.loads(Path("out/cost.json").read_text())
    assert list(results["inference"]) == ["teacher", "student"]  # both students are of one model
    for speeds in results["inference"].values():
        assert [speed["systems"] for speed in speeds] == [1, 4, 5]
        for speed in speeds:
            rate = speed["systems"] / speed["per_batch"]["median"]
            assert speed["systems_per_second"] == pytest.approx(rate)
            assert speed["peak_memory_bytes"] > 0
    assert results["md"]["atoms"] == 13
    assert len(results["md"]["per_step"]["teacher"]["seconds"]) == 3
    assert list(results["training"]) == ["distilled"]
    assert results["circumstances"]["threads"] == 1
    for name in ("cost_inference", "cost_training"):
        assert Path(f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "throughput (systems/s)" in Path("out/cost_inference.svg").read_text()
    assert "teacher forward" in Path("out/cost_training.svg").read_text()
    assert "| distilled | 3 | 0 |" in Path("out/cost.md").read_text()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["plain.pt", "--no-inference"], "no run was distilled"),
        (["plain.pt", "--batch-sizes", "1,x"], "does not read N,N"),
        (["plain.pt", "--repeats", "0"], "--repeats must be at least 1"),
        (["nothing.pt"], "nothing.pt does not exist"),
        (["plain.pt", "--data", "data/none"], "data/none does not exist"),
        (["plain.pt", "--teacher", "data"], "has neither best_checkpoint.pt"),
    ],
)
def test_refusals(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", *argv, "--cpu"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert re.search(sentence, text), text
