"""The options of a loss: defaults, what the command line gives, what is refused."""

from __future__ import annotations

import pytest
from terms import WHERE, feature_loss, generator

from fairchem_kd.errors import UserError
from fairchem_kd.features import FeatureSpec, Request
from fairchem_kd.losses import known_losses, loss_class

#: Where a config gives none.
COEFFICIENTS = {"n2n": 100.0, "e2n": 100.0, "v2v": 100.0, "vanilla": 1.0, "per_atom_energy": 1.0}


def test_defaults_of_the_kinds():
    defaults = {
        "n2n": (Request("node", "node"), Request("node", "node")),
        "e2n": (Request("node", "node"), Request("edge", "node")),
        "v2v": (Request("vector", "vector"), Request("vector", "vector")),
    }
    for kind, (student, teacher) in defaults.items():
        term = loss_class(kind, WHERE).from_options({}, WHERE)
        options = term.options
        assert term.student_requests() == [student]
        assert term.teacher_requests() == [teacher]
        assert (options.fn, options.projection, options.atoms) == ("mse", "linear", "all")
        assert options.standardize is True
        assert term.needs_outputs == ()
        assert not term.needs_atom_energy
    assert set(known_losses()) >= set(COEFFICIENTS)
    for kind, coefficient in COEFFICIENTS.items():
        term = loss_class(kind, WHERE).from_options({}, WHERE)
        assert term.kind == kind
        assert term.coefficient == coefficient
        assert term.schedule.factor(10, 100) == 1.0


def test_options_as_the_command_line_gives_them():
    given = {
        "fn": "huber",
        "delta": "1e-1",
        "student": "node@2",
        "teacher": "node@1+3",
        "standardize": "false",
        "coefficient": "3e-1",
        "schedule": {"warmup_steps": "500", "decay": "cosine", "final": "0.1"},
    }
    term = loss_class("n2n", WHERE).from_options(given, WHERE)
    assert term.student_requests() == [Request("node@2", "node")]
    assert term.teacher_requests() == [Request("node@1+3", "node")]
    assert (term.coefficient, term.options.delta, term.options.standardize) == (0.3, 0.1, False)
    assert term.schedule.factor(250, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("n2n", {"coefficient": -1}, "term.coefficient must be at least 0, not -1"),
        ("n2n", {"coefficient": "many"}, "term.coefficient must be a number"),
        ("n2n", {"fn": "msee"}, r"term.fn cannot be 'msee' \(did you mean 'mse'\?\)"),
        ("n2n", {"projektion": "mlp"}, r"'projektion' \(did you mean 'projection'\?\)"),
        ("e2n", {"atoms": "none"}, "term.atoms cannot be 'none'"),
        ("v2v", {"delta": 0}, "term.delta must be greater than 0"),
        ("vanilla", {"fn": "mse"}, "unknown key 'fn'"),
        ("vanilla", {"forces": -2}, "term.forces must be at least 0"),
        ("per_atom_energy", {"schedule": {"decay": "cos"}}, "schedule.decay cannot be 'cos'"),
    ],
)
def test_options_that_do_not_fit(kind, given, message):
    with pytest.raises(UserError, match=message):
        loss_class(kind, WHERE).from_options(given, WHERE)


def test_identity_with_unequal_channels():
    with pytest.raises(UserError) as error:
        feature_loss("n2n", student="node@2", projection="identity")
    for words in (f"{WHERE}.projection", "'node@2' has 5", "'node' has 7", "use linear"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "side", "wrong"),
    [("v2v", "student", "node"), ("v2v", "teacher", "node"), ("n2n", "teacher", "vector")],
)
def test_features_of_the_wrong_kind(kind, side, wrong):
    term = loss_class(kind, WHERE).from_options({side: "thing"}, WHERE)
    right = "vector" if kind == "v2v" else "node"
    specs = {
        name: {r: FeatureSpec(r.address, wrong if name == side else right, 4, "")}
        for name, (r,) in (
            ("student", term.student_requests()),
            ("teacher", term.teacher_requests()),
        )
    }
    with pytest.raises(UserError) as error:
        term.build(specs["student"], specs["teacher"], generator())
    for words in (f"{WHERE}.{side}", f"{kind} compares {right}", f"'thing' of the {side}", wrong):
        assert words in str(error.value)
