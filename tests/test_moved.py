"""Code that imports documented names by their first homes goes on working."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

from fairchem_kd.moved import MOVED

NAMES = {
    "fairchem_kd.trainer": ["DistillationTrainer"],
    "fairchem_kd.teacher": ["Teacher", "TeacherOutput"],
    "fairchem_kd.checkpoint": ["read_checkpoint"],
    "fairchem_kd.export": ["portable"],
    "fairchem_kd.records": ["read_records"],
    "fairchem_kd.analysis.evaluation": ["evaluate"],
    "fairchem_kd.analysis.extract": ["extract_features"],
    "fairchem_kd.analysis.gap": ["measure_gap"],
    "fairchem_kd.analysis.models": ["load_model", "read_model"],
    "fairchem_kd.analysis.similarity": ["Similarity"],
    "fairchem_kd.analysis.splits": ["open_split"],
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module(old: str) -> None:
    module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]
    for name in NAMES[old]:
        found = getattr(module, name)
        assert pickle.loads(pickle.dumps(found)) is found


def test_names_of_functions_stay() -> None:
    from fairchem_kd.data.build import ensure_built
    from fairchem_kd.data.convert import convert
    from fairchem_kd.data.create import create

    assert all(map(callable, (ensure_built, convert, create)))


def test_what_has_no_home_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fairchem_kd\.nowhere"):
        importlib.import_module("fairchem_kd.nowhere")


def test_in_a_fresh_process() -> None:
    code = (
        "from fairchem_kd.trainer import DistillationTrainer as old\n"
        "from fairchem_kd import DistillationTrainer as new\n"
        "assert old is new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
