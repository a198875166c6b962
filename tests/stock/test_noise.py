"""What the `fairchem` command logs: the time and the message, unless -v asks for all of stock's."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from fairchem_kd.stock import noise
from fairchem_kd.stock.configs import training_config


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a handler as stock sets it up writes, in place of the root's own."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s %(pathname)s:%(lineno)d: (%(levelname)s): %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )
    )
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    return text


def record(module: str, function: str, message: str, level: int = logging.INFO) -> None:
    path = f"/somewhere/{module}.py"
    made = logging.LogRecord("root", level, path, 7, message, (), None, function)
    for handler in logging.getLogger().handlers:
        handler.handle(made)


def lines() -> None:
    record("base_trainer", "__init__", "amp: false\ncmd: {}\n")
    record("data_parallel", "__init__", "Disabled BalancedBatchSampler because", logging.WARNING)
    record(
        "utils", "setup_env_vars", "Setting env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )
    record("_cli", "main", "Running in local mode without elastic launch (single gpu only)")
    record("base_trainer", "validate", "Evaluating on val.")
    record("closing", "tell", "a term is heavy", logging.WARNING)


def test_plain_lines(shown: io.StringIO) -> None:
    noise.plain_logs()
    noise.plain_logs()
    lines()
    told = [line.partition(" ")[2] for line in shown.getvalue().splitlines()]
    assert told == ["Evaluating on val.", "warning: a term is heavy"]


def test_verbose_is_stocks(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(noise.VERBOSE, "1")
    noise.plain_logs()
    lines()
    assert "amp: false" in shown.getvalue()
    assert "/somewhere/base_trainer.py:7: (INFO): Evaluating on val." in shown.getvalue()
    assert "Disabled BalancedBatchSampler" in shown.getvalue()


@pytest.mark.parametrize("verbose", [False, True])
def test_configs_that_overwrite_what_they_include_are_read_in_silence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verbose: bool,
) -> None:
    if verbose:
        monkeypatch.setenv(noise.VERBOSE, "1")
    (tmp_path / "base.yml").write_text("model: {}\ndataset: {}\noptim: {batch_size: 1}\n")
    (tmp_path / "over.yml").write_text("includes: [base.yml]\noptim: {batch_size: 2}\n")
    assert training_config(tmp_path / "over.yml")["optim"]["batch_size"] == 2
    assert ("Overwritten config parameters" in caplog.text) == verbose
    logging.warning("it speaks again")
    assert "it speaks again" in caplog.text
