"""The task.distillation block: what it accepts and what it refuses before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fairchem_kd.distillation.config import DistillationConfig, parse_distillation
from fairchem_kd.errors import UserError
from fairchem_kd.losses import EdgeToNode, NodeToNode

TEACHER = {"checkpoint": "teacher.pt"}


def parse(given: Any) -> DistillationConfig:
    return parse_distillation({"distillation": given})


def test_the_shortest_form_has_measured_defaults() -> None:
    config = parse({"teacher": TEACHER, "losses": {"e2n": {}}})
    (term,) = config.terms.values()
    assert isinstance(term, EdgeToNode)
    assert term.options.standardize
    assert term.coefficient > 0
    assert config.flush_denormal
    assert not config.validate


def test_terms_under_names_of_their_own_and_switched_off() -> None:
    losses = {
        "early": {"kind": "n2n", "student": "node@2", "schedule": {"decay": "cosine"}},
        "late": {"kind": "n2n", "coefficient": "0"},
        "v2v": None,
    }
    config = parse({"teacher": TEACHER, "losses": losses})
    assert list(config.terms) == ["early", "late"]
    assert list(config.active_terms) == ["early"]
    early = config.terms["early"]
    assert isinstance(early, NodeToNode)
    assert early.student_request.address == "node@2"
    assert early.schedule.decay == "cosine"


@pytest.mark.parametrize("given", [None, {}, {"losses": None}, {"losses": {"n2n": None}}])
def test_no_losses_is_plain_training_and_needs_no_teacher(given: object) -> None:
    assert parse(given).terms == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"losses": {"e2n": {}}}, "task.distillation.teacher.checkpoint is required"),
        ({"teachers": TEACHER}, "unknown key 'teachers' (did you mean 'teacher'?)"),
        ({"losses": {"e2m": {}}}, "losses.e2m has the unknown kind 'e2m' (did you mean 'e2n'?)"),
        ({"losses": {"a": {"kind": "nn"}}}, "losses.a has the unknown kind 'nn'"),
        ({"losses": {"e2n": {"coeficient": 1}}}, "(did you mean 'coefficient'?)"),
        ({"losses": {"e2n": {"coefficient": -1}}}, "losses.e2n.coefficient must be at least 0"),
        ({"losses": {"e2n": {"fn": "msa"}}}, "losses.e2n.fn cannot be 'msa'"),
        ({"losses": {"e2n": 3}}, "losses.e2n must be a mapping"),
        ({"losses": ["e2n"]}, "task.distillation.losses must be a mapping"),
        ({"losses": {"a.b": {"kind": "n2n"}}}, "losses.a.b: a term's name"),
        ({"losses": {"loss": {"kind": "n2n"}}}, "losses.loss: records have a value of that name"),
        ({"rattle": {"copies": -1}}, "task.distillation.rattle.copies must be at least 0, not -1"),
        ({"unlabelled": {"share": 0.5}}, "task.distillation.unlabelled.dataset is required"),
        (
            {"teacher": {**TEACHER, "precision": "bf61"}},
            "task.distillation.teacher.precision cannot be 'bf61' (did you mean 'bf16'?)",
        ),
        ({"teacher": {**TEACHER, "precison": "bf16"}}, "(did you mean 'precision'?)"),
        ({"losses": {"n2n": {"schedule": {"warmup": 1}}}}, "schedule has an unknown key 'warmup'"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse({"teacher": TEACHER, **given} if "losses" not in given else given)
    assert words in str(error.value)


def test_a_misspelt_block_is_not_plain_training() -> None:
    with pytest.raises(UserError, match="did you mean 'distillation'"):
        parse_distillation({"distilation": {"losses": {"e2n": {}}}})


def test_what_the_command_line_hands_over() -> None:
    given = {"teacher": {**TEACHER, "elements": "[H, Cu]"}, "losses": {"e2n": "null", "n2n": {}}}
    config = parse(given)
    assert list(config.terms) == ["n2n"]
    assert config.teacher.elements == ["H", "Cu"]
    assert parse({"teacher": {**TEACHER, "elements": [1, 29]}}).teacher.elements == [1, 29]


def test_parts_may_be_given_as_off() -> None:
    given = {"teacher": {**TEACHER, "precision": "fp32"}, "rattle": "null"}
    assert parse(given).rattle is None


def test_the_documentation_page_is_that_of_the_code() -> None:
    script = Path(__file__).parents[2] / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run: python docs/make_configuration.py"
    )
