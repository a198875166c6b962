"""The run's own record: one JSON object per line, whatever happens to the run."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from fairchem_kd.errors import UserError
from fairchem_kd.training.records import RECORDS, Records, read_records


def test_values_are_plain_json(tmp_path: Path) -> None:
    values = {"a": torch.tensor(1.5), "b": np.float64(2.0), "c": [torch.ones(2), Path("x")]}
    values["d"] = float("nan")
    Records(tmp_path).write("train", step=3, values=values)
    (record,) = read_records(tmp_path)
    assert record["kind"] == "train"
    assert record["seconds"] >= 0
    assert record["step"] == 3
    assert record["values"] == {"a": 1.5, "b": 2.0, "c": [[1.0, 1.0], "x"], "d": None}


def test_a_resumed_run_goes_on_after_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    Records(tmp_path).write("train", step=1)
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"kind": "train", "st')
    Records(tmp_path).write("val", step=2, metrics={})
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]
    assert [r["step"] for r in read_records(tmp_path, "val")] == [2]
    assert json.loads((tmp_path / RECORDS).read_text().splitlines()[-1])["step"] == 2


def test_a_full_disk_is_a_sentence_and_costs_one_line(tmp_path: Path) -> None:
    records = Records(tmp_path / "mine")
    records.write("train", step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = records.path.stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))  # writing fails half-way
    try:
        with pytest.raises(UserError, match=r"could not be written .* --timestamp-id mine\."):
            records.write("train", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    Records(tmp_path / "mine").write("train", step=2)
    assert [r["step"] for r in read_records(tmp_path / "mine")] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "[]", "null", "3", '"train"', "{}", '{"kind": 3, "seconds": 1}', '{"kind": "train"}',
        '{"kind": "train", "seconds": "long"}', '{"kind": "train", "seconds": true}',
        '{"kind": "train", "seconds": 1, "metrics": []}', '{"kind": "train", "sec', "\x00\x01",
        "[" * 100_000,
    ],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_lines_that_are_no_records_are_passed_over(tmp_path: Path, line: str) -> None:
    good = '{"kind": "train", "seconds": 1.5, "metrics": {"loss": 2.0}}'
    (tmp_path / RECORDS).write_text(f"{good}\n{line}\n{good}\n")
    assert [record["metrics"]["loss"] for record in read_records(tmp_path)] == [2.0, 2.0]
    (tmp_path / RECORDS).write_bytes(good.encode() + b"\n\xff\xfe\n")
    assert len(read_records(tmp_path, "train")) == 1
