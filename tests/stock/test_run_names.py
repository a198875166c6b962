"""A run's names are names of folders, and lead nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fairchem_kd.errors import UserError
from fairchem_kd.launch.run import main
from fairchem_kd.stock.trainer import StockTrainer, check_run_names

BAD = ["a/b", "../../x", "/tmp/x", "..", ".", "a\nerror: b", "a\rb", "\x1b[31m", "a\\b", "x" * 300]


@pytest.mark.parametrize("key", ["identifier", "timestamp_id"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_of_a_folder_is_refused(name: str, key: str) -> None:
    with pytest.raises(UserError, match=f"^--{key.replace('_', '-')} ") as refusal:
        check_run_names({key: name})
    assert str(refusal.value).isprintable()
    with pytest.raises(UserError, match=f"^--{key.replace('_', '-')} "):
        StockTrainer(**{key: name})


@pytest.mark.parametrize("name", ["", None, "e2n", "2026-01-01-00-00-00-a b.c_d", "größer", "..."])
def test_other_names_are_left(name: str | None) -> None:
    check_run_names({"identifier": name, "timestamp_id": name})


@pytest.mark.parametrize("flag", ["--identifier", "--timestamp-id"])
def test_the_command_refuses_before_anything_is_written(
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    config = {"trainer": "ocp", "model": {}, "dataset": {}, "optim": {}}
    Path("run.yml").write_text(yaml.safe_dump(config))
    argv = ["--mode", "train", "--config-yml", "run.yml", flag, "../../outside"]
    assert main(argv) == 2
    assert f"error: {flag} '../../outside' cannot be" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "run.yml"]
